"""Which parameters train: exactly the named sets, and nothing else."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mera_ds.config import LoraConfig
from mera_ds.errors import InputError
from mera_ds.model.connectors import build_connector
from mera_ds.model.lora import attach_lora, lora_parameters
from mera_ds.model.mllm import MultimodalLM
from mera_ds.model.trainable import parameter_sets, set_trainable
from mera_ds.plan import LORA, connector_set

MLP = {"layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"}
DEEPER = {*MLP, "layers.4.weight", "layers.4.bias"}


def tiny_model(lora: bool = True) -> MultimodalLM:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    llm = LlamaForCausalLM(config)
    if lora:
        attach_lora(llm, LoraConfig(rank=2, alpha=2.0))
    connectors = {
        "image": build_connector("mlp", {}, 8, 16),
        "audio": build_connector("mlp", {"depth": 3}, 8, 16),
    }
    return MultimodalLM(llm, connectors, {}, 64)


def trained(model: MultimodalLM) -> set[str]:
    """Return the full names of all parameters that require a gradient."""
    return {name for name, entry in model.named_parameters() if entry.requires_grad}


def lora_names(model: MultimodalLM) -> set[str]:
    return {name for name, _ in model.named_parameters() if ".lora_" in name}


def test_sets_have_the_names_of_their_files() -> None:
    sets = parameter_sets(tiny_model())
    assert set(sets) == {"connector:image", "connector:audio", "lora"}
    assert set(sets["connector:image"]) == MLP
    assert set(sets["connector:audio"]) == DEEPER
    assert len(sets[LORA]) == 2 * 2 * 7


def test_without_lora_the_backbone_is_a_set() -> None:
    model = tiny_model(lora=False)
    sets = parameter_sets(model)
    assert set(sets) == {"connector:image", "connector:audio", "backbone"}
    assert set(sets["backbone"]) == set(model.llm.state_dict())


@pytest.mark.parametrize(
    ("chosen", "image", "audio", "lora"),
    [
        (["connector:image"], True, False, False),
        (["connector:audio", "lora"], False, True, True),
        (["connector:image", "connector:audio"], True, True, False),
        (["lora"], False, False, True),
        ([], False, False, False),
    ],
)
def test_exactly_the_named_sets_train(
    chosen: list[str], image: bool, audio: bool, lora: bool
) -> None:
    model = tiny_model()
    model.requires_grad_(True)
    sets = set_trainable(model, chosen)
    expected: set[str] = set()
    expected |= {f"connectors.image.{name}" for name in MLP} if image else set()
    expected |= {f"connectors.audio.{name}" for name in DEEPER} if audio else set()
    expected |= lora_names(model) if lora else set()
    assert trained(model) == expected
    assert list(sets) == chosen
    assert sum(len(entry) for entry in sets.values()) == len(expected)


def test_the_sets_are_the_parameters_themselves() -> None:
    model = tiny_model()
    sets = set_trainable(model, [connector_set("image"), LORA])
    for parameter in sets[connector_set("image")].values():
        parameter.data.fill_(3)
    assert all(bool((entry == 3).all()) for entry in model.connectors["image"].parameters())
    assert all(sets[LORA][name] is entry for name, entry in lora_parameters(model.llm).items())


def test_an_unknown_set_gets_the_nearest() -> None:
    with pytest.raises(InputError, match=r"set 'connector:imgae' is unknown; .*connector:image"):
        set_trainable(tiny_model(), ["connector:imgae"])


def test_lora_must_be_attached_to_be_trained() -> None:
    with pytest.raises(InputError, match="trainable set 'lora' is unknown"):
        set_trainable(tiny_model(lora=False), [LORA])


def test_two_connectors_may_not_share_a_parameter() -> None:
    model = tiny_model()
    shared = torch.nn.Parameter(torch.zeros(16))
    model.connectors["image"].layers[2].bias = shared
    model.connectors["audio"].layers[2].bias = shared
    with pytest.raises(AssertionError, match="must not share"):
        set_trainable(model, [connector_set("image"), connector_set("audio")])
