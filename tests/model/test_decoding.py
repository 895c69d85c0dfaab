"""The decoder with a fixed cache against transformers' greedy loop, for several families."""

from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_backbones import FAMILIES, WIDTH, write_backbone
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from mera_ds.errors import InputError
from mera_ds.model.decoding import StaticDecoder, make_decoder, next_token

LENGTHS = (9, 23, 4)
"""Tokens per prompt; Mistral's window here has 16."""
NEW = 20


@pytest.fixture(scope="module", params=list(FAMILIES))
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_backbone(tmp_path_factory.mktemp("backbone") / "llm", request.param)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config = GenerationConfig()
    return model


def prompts(*lengths: int) -> tuple[Tensor, Tensor]:
    """Return embeddings (B, T, D), padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(sum(lengths))
    longest = max(lengths)
    embeddings = torch.zeros(len(lengths), longest, WIDTH)
    attention = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        embeddings[row, longest - length :] = torch.randn(length, WIDTH, generator=generator)
        attention[row, longest - length :] = 1
    return embeddings, attention


def cut(ids: Tensor, ends: Sequence[int]) -> list[list[int]]:
    """Return each row up to its first end."""
    return [list(takewhile(lambda number: number not in ends, row)) for row in ids.tolist()]


def plain(llm: Any, case: tuple[Tensor, Tensor], ends: Sequence[int]) -> list[list[int]]:
    """Return what transformers' own greedy loop says."""
    embeddings, attention = case
    ids = llm.generate(
        inputs_embeds=embeddings,
        attention_mask=attention,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=list(ends) or None,
        pad_token_id=0,
    )
    return cut(ids, ends)


def test_it_says_what_the_plain_loop_says(llm: Any) -> None:
    cases = [prompts(*LENGTHS), prompts(12), prompts(8, 8), prompts(30, 2)]
    free = plain(llm, cases[0], ())
    ends = (free[0][4], free[1][11])
    expected = [plain(llm, case, ends) for case in cases]
    assert len({len(text) for text in expected[0]}) > 1, "no text ended before others"
    decoder = StaticDecoder(llm)
    # Smaller batches after a larger one: the cache is used again, and filled up.
    assert [cut(decoder(*case, NEW, ends), ends) for case in cases] == expected
    # One row alone has a cache of its own, and no mask.
    assert cut(StaticDecoder(llm)(*cases[1], NEW, ends), ends) == expected[1]


def test_a_token_is_one_graph(llm: Any, request: pytest.FixtureRequest) -> None:
    """`fullgraph` refuses whatever would send a step back to Python."""
    if "mistral" in request.node.name:
        pytest.skip("a sliding window counts in Python")
    torch._dynamo.reset()
    compiled: Callable[..., Tensor] = torch.compile(next_token, backend="eager", fullgraph=True)
    case = prompts(*LENGTHS)
    decoder = StaticDecoder(llm, compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        first, again = decoder(*case, NEW, ()), decoder(*prompts(10, 21, 3), NEW, ())
    assert torch.equal(first, StaticDecoder(llm)(*case, NEW, ()))
    assert first.shape == again.shape == (3, NEW)


def test_it_stops_when_all_rows_have_ended(llm: Any) -> None:
    calls = []

    def counted(*arguments: Any) -> Tensor:
        calls.append(1)
        return next_token(*arguments)

    said = StaticDecoder(llm, counted)(*prompts(5, 6), 200, range(len(llm.lm_head.weight)))
    assert said.shape[1] == 8
    assert len(calls) == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_graphs_need_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"execution\.decode=compiled needs a GPU"):
        make_decoder(None, "compiled", 1)
