"""Merge methods on whole checkpoints, against dense computations of their equations."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mera_ds.errors import InputError
from mera_ds.merge import digest, stream
from mera_ds.merge.compare import RECORD
from mera_ds.merge.methods import METHODS
from mera_ds.merge.state_dicts import carry_out, prepare_merge

from .models import bare_checkpoint, contents, state
from .test_methods import Dense, dare, magmax, slerp, ties, weighted

SHAPES = {"net.mlp.up.weight": (60, 50), "net.attn.q.weight": (30, 7), "net.frozen.weight": (9, 9)}
WITH_BASE: dict[str, tuple[dict[str, Any], Dense]] = {
    "slerp": ({}, slerp),
    "task-arithmetic": ({"value": 0.3}, weighted(0.3, 0.3)),
    "ties": ({}, ties),
    "dare": ({}, dare),
    "magmax": ({}, magmax),
}
BY_WEIGHT: dict[str, tuple[str, dict[str, Any], float]] = {
    "cma": ("cma", {}, 1 / 4),
    "scale": ("scale", {}, 1 / 2),
    "scale constant": ("scale", {"rule": "constant", "value": 0.3}, 0.3),
    "ema": ("ema", {"decay": 0.9}, 0.1),
}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Return three checkpoints, each trained from the one before; tensors have many blocks."""
    monkeypatch.setattr(digest, "BLOCK", 1024)
    monkeypatch.setattr(stream, "SPAN", 1024)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    found = {}
    for name in ("base", "previous", "tuned"):
        found[name] = bare_checkpoint(tmp_path / name, **tensors)
        tensors = {
            key: value if "frozen" in key else value + torch.randn(value.shape, generator=generator)
            for key, value in tensors.items()
        }
    return found


def merge(models: Mapping[str, Path], out: str, **how: Any) -> Path:
    """Merge as stage 2 unless another is given."""
    output = models["previous"].with_name(out)
    stage, workers = how.pop("stage", 2), how.pop("workers", 2)
    plan = prepare_merge(models["previous"], models["tuned"], stage, output, workers=workers, **how)
    carry_out(plan, output, workers=workers)
    return output


def deltas(models: Mapping[str, Path], name: str) -> list[Tensor]:
    base, previous, tuned = (state(models[key])[name].double() for key in models)
    return [previous - base, tuned - previous]


@pytest.mark.parametrize("method", WITH_BASE)
def test_it_is_its_equation(method: str, models: dict[str, Path]) -> None:
    options, dense = WITH_BASE[method]
    found = state(merge(models, "out", method=method, options=options, base=models["base"]))
    for name, base in state(models["base"]).items():
        if "frozen" in name:
            assert torch.equal(found[name], base)
            continue
        expected = dense(deltas(models, name), name.removesuffix(".weight"), [])
        update = found[name].double() - base.double()
        assert float((update - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("case", BY_WEIGHT)
def test_a_weight_of_the_update(case: str, models: dict[str, Path]) -> None:
    method, options, weight = BY_WEIGHT[case]
    found = state(merge(models, "out", stage=4, method=method, options=options))
    old, new = state(models["previous"]), state(models["tuned"])
    for name in SHAPES:
        expected = old[name] + weight * (new[name] - old[name])
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)


def test_layers_may_have_their_own_weight(models: dict[str, Path]) -> None:
    options = {"rule": "constant", "value": 0.0, "layers": {"*.attn.*": 1.0}}
    found = state(merge(models, "out", method="scale", options=options))
    old, new = state(models["previous"]), state(models["tuned"])
    assert torch.equal(found["net.mlp.up.weight"], old["net.mlp.up.weight"])
    assert torch.equal(found["net.attn.q.weight"], new["net.attn.q.weight"])


def test_later_stages_count_less(models: dict[str, Path]) -> None:
    """What was merged so far is one update; a later stage's share is 1/i."""
    found = state(merge(models, "out", stage=5, method="slerp", base=models["base"]))
    older, newest = deltas(models, "net.mlp.up.weight")
    cosine = (older * (older + newest)).sum() / older.norm() / (older + newest).norm()
    angle = torch.acos(cosine)
    expected = (0.8 * angle).sin() * older + (0.2 * angle).sin() * (older + newest)
    update = found["net.mlp.up.weight"] - state(models["base"])["net.mlp.up.weight"]
    torch.testing.assert_close(update, (expected / angle.sin()).float(), rtol=1e-4, atol=1e-5)


def test_any_number_of_threads_writes_the_same(models: dict[str, Path]) -> None:
    how = {"method": "ties", "base": models["base"], "shard_size": 4000}
    assert contents(merge(models, "one", workers=1, **how)) == contents(
        merge(models, "three", workers=3, **how)
    )


def test_the_record_names_method_and_base(models: dict[str, Path]) -> None:
    how: dict[str, Any] = {"method": "ties", "options": {"density": 0.5}, "base": models["base"]}
    record = json.loads((merge(models, "out", **how) / RECORD).read_text())
    assert (record["method"], record["options"]) == ("ties", {"density": 0.5})
    assert record["inputs"]["base"]["folder"] == "base"
    assert "coefficient" not in record


def test_every_method_is_defined_or_refused(models: dict[str, Path]) -> None:
    """Those that need factors or gradients say where to find them."""
    assert set(WITH_BASE) == {name for name, kind in METHODS.items() if kind.combine is not None}
    undefined = METHODS.keys() - WITH_BASE - {method for method, _, _ in BY_WEIGHT.values()}
    assert undefined == {"fisher", "opcm", "swudi"}
    for name in undefined:
        with pytest.raises(InputError, match=rf"lineage reweight RUN --method {name}', or one of"):
            merge(models, "out", method=name)


@pytest.mark.parametrize("method", WITH_BASE)
def test_a_missing_base(method: str, models: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="give its folder as --base"):
        merge(models, "out", method=method)


def test_a_base_without_use(models: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="--base is of no use to --method cma"):
        merge(models, "out", base=models["base"])


def test_another_base(models: dict[str, Path], tmp_path: Path) -> None:
    other = bare_checkpoint(
        tmp_path / "other", **{"net.mlp.up.weight": torch.ones(3), "x": torch.ones(1)}
    )
    with pytest.raises(InputError) as error:
        merge(models, "out", method="ties", base=other)
    assert "'net.mlp.up.weight' is F32 (3,) in" in str(error.value)
    assert "'net.attn.q.weight' is only in" in str(error.value)


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(64, 64, generator=generator).half() for _ in range(3)]
    base, previous, tuned = (
        bare_checkpoint(tmp_path / name, w=value)
        for name, value in zip(("base", "previous", "tuned"), values, strict=True)
    )
    models = {"base": base, "previous": previous, "tuned": tuned}
    found = state(merge(models, "out", method="task-arithmetic", base=base))["w"]
    exact = values[0].double() + 0.4 * (values[2].double() - values[0].double())
    ulp = 2.0 ** (torch.frexp(exact).exponent - 11)
    assert float(((found.double() - exact).abs() / ulp).max()) < 0.5 + 1e-2
