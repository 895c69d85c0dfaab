"""The input embedding in host memory: the same results, and nothing moves it."""

from pathlib import Path

import pytest
import torch
from chat_backbones import write_backbone
from test_mllm import assert_close, batch, gradients, sample, tiny_llm, tiny_model

from mera_ds.config import BackboneConfig
from mera_ds.errors import InputError
from mera_ds.model.backbone import load_backbone, load_tokenizer
from mera_ds.model.embedding import HostEmbedding, keep_embedding_on_host


def test_loss_and_gradients_stay_the_same() -> None:
    plain, hosted = tiny_model(), tiny_model()
    for model in (plain, hosted):
        model.llm.requires_grad_(False)
    keep_embedding_on_host(hosted.llm)
    rows = batch([sample(number) for number in range(3)])
    assert torch.equal(hosted(rows), plain(rows))
    expected = gradients(plain, plain(rows))
    assert expected
    assert_close(gradients(hosted, hosted(rows)), expected)


def test_generation_stays_the_same(tiny_template: Path) -> None:
    tokenizer = load_tokenizer(tiny_template / "backbone")
    rows = [sample(number, answered=False) for number in range(3)]
    expected = tiny_model().generate(rows, 6, tokenizer)
    hosted = tiny_model()
    keep_embedding_on_host(hosted.llm)
    assert hosted.generate(rows, 6, tokenizer) == expected


def test_moving_and_casting_leave_it(tmp_path: Path) -> None:
    folder = write_backbone(tmp_path / "llama", "llama")
    config = BackboneConfig(path=str(folder), embedding_device="cpu")
    llm = load_backbone(config, folder)
    embedding = llm.get_input_embeddings()
    assert isinstance(embedding, HostEmbedding)
    shape = (llm.config.vocab_size, llm.config.hidden_size)
    assert tuple(embedding.weight.shape) == shape
    llm.half().to("meta")
    assert embedding.weight.device.type == "cpu"
    assert embedding.weight.dtype == torch.float32
    assert not [name for name, _ in llm.named_parameters() if "embed" in name]
    assert not list(embedding.state_dict())


def test_rows_go_to_the_device_of_the_ids() -> None:
    embedding = HostEmbedding(torch.nn.Embedding(5, 3))
    assert torch.equal(embedding(torch.tensor([[4, 1]]))[0], embedding.weight[[4, 1]])
    assert not embedding(torch.tensor([0])).requires_grad


def test_it_is_refused_where_it_saves_nothing() -> None:
    with pytest.raises(InputError, match="its input embedding is its output head, too"):
        keep_embedding_on_host(tiny_llm(tie_word_embeddings=True))
