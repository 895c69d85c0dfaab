"""Connectors: shapes, masks, scale, gradients, and starting from a BERT."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertConfig, BertModel

from mera_ds.errors import DataError, InputError
from mera_ds.model.connectors import Connector, build_connector

FEATURE_DIM, LLM_DIM = 24, 40
SMALL_QFORMER = {"num_queries": 5, "hidden": 16, "layers": 3, "heads": 4, "dropout": 0.0}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("mlp", {}),
    ("mlp", {"depth": 1}),
    ("mlp", {"depth": 3, "hidden": 12, "norm": "layer", "output_rms": 0.1}),
    ("qformer", SMALL_QFORMER),
    (
        "qformer",
        SMALL_QFORMER | {"norm": "layer", "output_rms": 0.1, "cross_attention_frequency": 1},
    ),
]


def build(kind: str, options: dict[str, Any], weights: Path | None = None) -> Connector:
    torch.manual_seed(0)
    return build_connector(kind, options, FEATURE_DIM, LLM_DIM, weights)


def features(batch: int, count: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, count, FEATURE_DIM, generator=torch.Generator().manual_seed(seed))


def full_mask(batch: int, count: int) -> Tensor:
    return torch.ones(batch, count, dtype=torch.bool)


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize("count", [1, 7])
def test_output_shape_is_announced(kind: str, options: dict[str, Any], count: int) -> None:
    connector = build(kind, options)
    tokens = connector(features(3, count), full_mask(3, count))
    assert tokens.shape == (3, connector.num_tokens(count), LLM_DIM)
    assert connector.num_tokens(count) == (count if kind == "mlp" else 5)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_every_parameter_gets_a_gradient(kind: str, options: dict[str, Any]) -> None:
    connector = build(kind, options)
    tokens = connector(features(3, 6), full_mask(3, 6))
    (tokens * features(3, 6)[:, : tokens.shape[1], :1]).sum().backward()
    missing = [name for name, value in connector.named_parameters() if value.grad is None]
    assert missing == []
    # A key's bias adds the same to all of a softmax's inputs: its exact gradient is zero.
    idle = [
        name
        for name, value in connector.named_parameters()
        if value.grad is not None and value.grad.abs().max() < 1e-7 and "key.bias" not in name
    ]
    assert idle == []


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_tokens_outside_the_mask_have_no_influence(kind: str, options: dict[str, Any]) -> None:
    connector = build(kind, options).eval()
    values, mask = features(2, 6), full_mask(2, 6)
    mask[1, 4:] = False
    changed = values.clone()
    changed[1, 4:] = 100.0
    tokens = connector(values, mask)
    assert torch.equal(tokens, connector(changed, mask))
    alone = connector(values[1:, :4], mask[1:, :4])
    assert torch.allclose(tokens[1:, : alone.shape[1]], alone, atol=1e-6)
    if kind == "mlp":
        assert not tokens[1, 4:].any()


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_nothing_in_nothing_broken(kind: str, options: dict[str, Any]) -> None:
    connector = build(kind, options)
    zeros = torch.zeros(1, 1, FEATURE_DIM)
    for mask in (full_mask(1, 1), ~full_mask(1, 1)):
        tokens = connector(zeros, mask)
        (0.0 * tokens).sum().backward()
        assert torch.isfinite(tokens).all()
    gradients = [value.grad for value in connector.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_weights_come_from_the_global_seed(kind: str, options: dict[str, Any]) -> None:
    first, second = build(kind, options).state_dict(), build(kind, options).state_dict()
    torch.manual_seed(7)
    other = build_connector(kind, options, FEATURE_DIM, LLM_DIM).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_scaling_the_output_takes_no_random_numbers() -> None:
    build("mlp", {})
    expected = torch.rand(1)
    build("mlp", {"output_rms": 0.5})
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_fresh_tokens_have_the_asked_scale(kind: str, options: dict[str, Any]) -> None:
    connector = build(kind, options | {"norm": "layer", "output_rms": 0.13}).eval()
    tokens = connector(50 * features(32, 20) + 3, full_mask(32, 20))
    assert tokens.square().mean().sqrt().item() == pytest.approx(0.13, rel=0.15)


def test_mlp_is_linear_gelu_linear() -> None:
    connector = build("mlp", {})
    state = connector.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "layers.0.weight": (LLM_DIM, FEATURE_DIM),
        "layers.0.bias": (LLM_DIM,),
        "layers.2.weight": (LLM_DIM, LLM_DIM),
        "layers.2.bias": (LLM_DIM,),
    }
    values = features(2, 3)
    hidden = values @ state["layers.0.weight"].T + state["layers.0.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    expected = hidden @ state["layers.2.weight"].T + state["layers.2.bias"]
    assert torch.allclose(connector(values, full_mask(2, 3)), expected, atol=1e-5)


def layer(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def blip2_shapes() -> dict[str, tuple[int, ...]]:
    """Return the tensors of BLIP-2's Q-Former on features of width 768."""
    shapes: dict[str, tuple[int, ...]] = {}
    norms = ["layernorm"]
    for number in range(12):
        block = f"encoder.layer.{number}"
        for name in ["attention"] + ["crossattention"] * (number % 2 == 0):
            for part in ("query", "key", "value"):
                shapes |= layer(f"{block}.{name}.attention.{part}", 768, 768)
            shapes |= layer(f"{block}.{name}.output.dense", 768, 768)
            norms.append(f"{block}.{name}.output.LayerNorm")
        shapes |= layer(f"{block}.intermediate_query.dense", 3072, 768)
        shapes |= layer(f"{block}.output_query.dense", 768, 3072)
        norms.append(f"{block}.output_query.LayerNorm")
    return shapes | {f"{name}.{part}": (768,) for name in norms for part in ("weight", "bias")}


def test_default_qformer_is_blip2s() -> None:
    with torch.device("meta"):
        connector = build_connector("qformer", {}, 768, 4096)
    parameters = dict(connector.named_parameters())
    qformer = {name: p for name, p in parameters.items() if name.startswith("qformer.")}
    shapes = {name.removeprefix("qformer."): tuple(p.shape) for name, p in qformer.items()}
    assert shapes == blip2_shapes()
    assert len(qformer) == 254
    assert sum(value.numel() for value in qformer.values()) == 99_239_424
    others = {name: tuple(p.shape) for name, p in parameters.items() if name not in qformer}
    assert others == {
        "queries": (1, 32, 768),
        "project.weight": (4096, 768),
        "project.bias": (4096,),
    }
    assert connector.num_tokens(248) == 32


def test_what_bert_does_not_give_is_drawn_as_bert_was(tmp_path: Path) -> None:
    options = {"num_queries": 32, "hidden": 128, "layers": 2, "heads": 4}
    connector: Any = build("qformer", options)
    assert connector.queries.std().item() == pytest.approx(0.02, rel=0.05)
    for name, value in connector.qformer.named_parameters():
        if "LayerNorm" in name or "layernorm" in name:
            assert torch.equal(value, torch.ones(128) * name.endswith("weight"))
        elif name.endswith("bias"):
            assert not value.any()
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_qformer_works_in_half_precision(precision: torch.dtype) -> None:
    connector = build("qformer", SMALL_QFORMER | {"norm": "layer"}).eval()
    values, mask = features(2, 6), full_mask(2, 6)
    mask[1, 2:] = False
    expected = connector(values, mask)
    tokens = connector.to(precision)(values.to(precision), mask)
    assert tokens.dtype == precision
    assert torch.nn.functional.cosine_similarity(tokens.float(), expected, dim=-1).min() > 0.99


@pytest.fixture
def bert(tmp_path: Path) -> tuple[BertModel, Path]:
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    return model, tmp_path


def published_names(model: BertModel) -> dict[str, Tensor]:
    """Rename a BERT's tensors as the official bert-base-uncased file has them."""
    state = model.state_dict()
    return {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value.contiguous()
        for name, value in state.items()
    }


def save_bert(model: BertModel, folder: Path, layout: str) -> Path:
    """Write a BERT in one of the published layouts; return what a connector is given."""
    if layout == "newer names":
        save_file(model.state_dict(), folder / "model.safetensors")
    elif layout == "torch":
        others = {"cls.predictions.bias": torch.ones(50)}
        torch.save(published_names(model) | others, folder / "pytorch_model.bin")
    else:
        save_file(published_names(model), folder / "model.safetensors")
    return folder / "model.safetensors" if layout == "file" else folder


@pytest.mark.parametrize("layout", ["folder", "file", "newer names", "torch"])
def test_qformer_starts_from_bert(bert: tuple[BertModel, Path], layout: str) -> None:
    model, folder = bert
    path = save_bert(model, folder, layout)
    # Layers 1 and 2 of the connector have no cross-attention, so without the first layer's it is
    # the BERT's own encoder.
    options = SMALL_QFORMER | {"cross_attention_frequency": 3}
    connector: Any = build("qformer", options, path).eval()
    connector.qformer.encoder.layer[0].crossattention = PassThrough()
    hidden = connector.qformer(
        query_embeds=features(2, 5)[..., :16], encoder_hidden_states=features(2, 6)
    ).last_hidden_state
    embedded = model.embeddings.LayerNorm(features(2, 5)[..., :16])
    for layer in model.encoder.layer[:3]:
        output = layer(embedded)
        embedded = output[0] if isinstance(output, tuple) else output
    assert torch.allclose(hidden, embedded, atol=1e-5)


class PassThrough(torch.nn.Module):
    """Cross-attention that adds nothing."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


def test_bert_of_another_width_is_refused(bert: tuple[BertModel, Path]) -> None:
    model, folder = bert
    save_file(published_names(model), folder / "model.safetensors")
    with pytest.raises(DataError, match="ask for"):
        build("qformer", SMALL_QFORMER | {"hidden": 32}, folder)
    with pytest.raises(DataError, match="enough layers"):
        build("qformer", SMALL_QFORMER | {"layers": 5}, folder)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mpl", {}, "did you mean 'mlp'"),
        ("mlp", {"dept": 2}, "did you mean 'depth'"),
        ("mlp", {"depth": 0}, "depth is 0"),
        ("mlp", {"output_rms": -1.0}, "output_rms"),
        ("mlp", {"depth": 3, "widths": [8]}, "depth=3 needs 2"),
        ("mlp", {"widths": [0]}, "widths is 0"),
        ("mlp", {"hidden": 8, "widths": [8]}, "remove one"),
        ("qformer", {"hidden": 10, "heads": 4}, "multiple of heads=4"),
        ("qformer", {"num_queries": 0}, "num_queries is 0"),
        ("qformer", {"dropout": 1.0}, "dropout"),
    ],
)
def test_wrong_options_are_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(kind, options)


def test_missing_or_broken_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="do not exist"):
        build("mlp", {}, tmp_path / "nowhere.bin")
    with pytest.raises(InputError, match="do not exist"):
        build("qformer", SMALL_QFORMER, tmp_path / "nowhere.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(DataError, match="not a readable safetensors"):
        build("qformer", SMALL_QFORMER, tmp_path)


def projector(widths: list[int]) -> dict[str, Tensor]:
    """Return the layers of a projector, numbered as LLaVA does."""
    torch.manual_seed(4)
    state = {}
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        state[f"{2 * number}.weight"] = torch.randn(outputs, inputs)
        state[f"{2 * number}.bias"] = torch.randn(outputs)
    return state


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        ("model.mm_projector.", "mm_projector.bin"),
        ("base_model.model.model.mm_projector.", "non_lora_trainables.bin"),
        ("model.mm_projector.", "model.safetensors"),
        ("mm_projector.", "mm_projector.bin"),
        ("", "projector.pt"),
    ],
)
def test_mlp_starts_from_llavas_projector(prefix: str, name: str, tmp_path: Path) -> None:
    state = projector([FEATURE_DIM, LLM_DIM, LLM_DIM])
    named = {prefix + key: value for key, value in state.items()}
    if prefix:
        named["model.embed_tokens.weight"] = torch.ones(2, 2)
    save = save_file if name.endswith("safetensors") else torch.save
    save(named, tmp_path / name)
    connector: Any = build("mlp", {"norm": "layer"}, tmp_path / name)
    assert connector.layers.state_dict().keys() == state.keys()
    for key, value in connector.layers.state_dict().items():
        assert torch.equal(value, state[key])
    assert all(parameter.requires_grad for parameter in connector.parameters())


def test_mlp_starts_from_pointllms_projector(tmp_path: Path) -> None:
    state = projector([FEATURE_DIM, 10, 20, LLM_DIM])
    path = tmp_path / "pytorch_model.bin"
    torch.save({f"model.point_proj.{key}": value for key, value in state.items()}, path)
    options = {"depth": 3, "widths": [10, 20]}
    connector: Any = build("mlp", options, path)
    values = features(2, 3)
    hidden = values
    for number in (0, 2, 4):
        hidden = hidden @ state[f"{number}.weight"].T + state[f"{number}.bias"]
        hidden = torch.nn.functional.gelu(hidden) if number < 4 else hidden
    assert torch.allclose(connector(values, full_mask(2, 3)), hidden, rtol=1e-4, atol=1e-3)


def test_projectors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mm_projector.bin"
    state = projector([FEATURE_DIM, LLM_DIM, LLM_DIM])

    def refused(message: str, state: dict[str, Tensor], **options: Any) -> None:
        torch.save(state, path)
        with pytest.raises(DataError, match=message):
            build("mlp", options, path)

    named = {f"model.mm_projector.{key}": value for key, value in state.items()}
    refused("has no tensor '4.bias'", named, depth=3)
    refused("holds '2.bias'", named, depth=1)
    refused(r"'0.bias' has shape \(40,\) instead of \(8,\)", named, hidden=8)
    refused("holds 'extra'", state | {"extra": torch.ones(1)})
    refused("more than one 'mm_projector'", named | {"mm_projector.0.bias": torch.ones(LLM_DIM)})
    refused("not finite", state | {"0.bias": torch.full((LLM_DIM,), float("nan"))})
    torch.save(named, path)
    with pytest.raises(InputError, match="output_rms would rescale"):
        build("mlp", {"output_rms": 0.1}, path)


def test_data_norm_standardises_the_channels_and_is_stored_with_the_connector() -> None:
    torch.manual_seed(0)
    features = 5.0 + 3.0 * torch.randn(200, 8) * torch.arange(1, 9)
    connector = build_connector("mlp", {"norm": "data"}, 8, 16)
    connector.fit(features[None], torch.ones(1, 200, dtype=torch.bool))
    normal = connector.norm(features)
    assert torch.allclose(normal.mean(dim=0), torch.zeros(8), atol=1e-5)
    assert torch.allclose(normal.std(dim=0, unbiased=False), torch.ones(8), atol=1e-5)
    assert {"norm.mean", "norm.deviation"} <= connector.state_dict().keys()
    assert not any(name.startswith("norm.") for name, _ in connector.named_parameters())


def test_data_norm_takes_the_common_part_off_the_tokens_of_a_qformer() -> None:
    torch.manual_seed(0)
    options = SMALL_QFORMER | {"norm": "data", "output_rms": 0.2}
    connector = build_connector("qformer", options, 8, 16).eval()
    features, mask = torch.randn(64, 5, 8) + 3.0, torch.ones(64, 5, dtype=torch.bool)
    connector.fit(features, mask)
    tokens = connector(features, mask)
    assert torch.allclose(tokens.mean(dim=0), torch.zeros(tokens.shape[1:]), atol=1e-3)
    assert abs(float(tokens.square().mean().sqrt()) - 0.2) < 1e-4
