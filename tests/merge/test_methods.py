"""Every merge method against a dense computation of its equation, on small matrices."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mera_ds.checkpoint import load_tensors, read_manifest
from mera_ds.errors import InputError
from mera_ds.merge.export import lineage_update, method_update
from mera_ds.merge.lineage import apply_method, reweight_product
from mera_ds.merge.methods import METHODS, open_method
from mera_ds.merge.methods.base import seed_of

from .conftest import SHAPES, trained_deltas

Dense = Callable[[Sequence[Tensor], str, Sequence[Tensor]], Tensor]


def update_of(product: Path, name: str, options: Mapping[str, Any], layer: str) -> Tensor:
    """Return what a method adds to a layer, dense."""
    _, update = method_update(product, read_manifest(product), open_method(name, options))
    found = update(layer)
    if isinstance(found, Tensor):
        return found.double()
    return sum_of(found)


def sum_of(terms: Sequence[tuple[float, Tensor, Tensor]]) -> Tensor:
    first, *others = (w * left.double() @ right.double() for w, left, right in terms)
    return sum(others, first)


def fishers(product: Path, layer: str) -> list[Tensor]:
    """Return the diagonal Fisher information of every stage, dense."""
    found = []
    for entry in read_manifest(product).lineage:
        assert entry.fisher is not None
        tensors = load_tensors(product / entry.fisher.file, entry.fisher.sha256)
        rows, columns = (tensors[f"{layer}.{side}"].double() for side in ("rows", "columns"))
        found.append(rows[:, None] * columns[None])
    return found


def weighted(*weights: float) -> Dense:
    return lambda deltas, layer, _: sum(
        (w * d for w, d in zip(weights, deltas, strict=True)), torch.zeros_like(deltas[0])
    )


def slerp(deltas: Sequence[Tensor], layer: str, _: Sequence[Tensor]) -> Tensor:
    merged = deltas[0]
    for stage, delta in enumerate(deltas[1:], start=2):
        after, t = merged + delta, 1 / stage
        cosine = (merged * after).sum() / merged.norm() / after.norm()
        angle = math.acos(float(cosine))
        first = math.sin((1 - t) * angle) / math.sin(angle)
        merged = first * merged + math.sin(t * angle) / math.sin(angle) * after
    return merged


def opcm(deltas: Sequence[Tensor], layer: str, _: Sequence[Tensor]) -> Tensor:
    total = deltas[0]
    for stage, delta in enumerate(deltas[1:], start=2):
        u, values, vh = torch.linalg.svd(total)
        rank = int((values > 1e-9 * values[0]).sum())
        shares = values[:rank].cumsum(0) / values[:rank].sum()
        leading = int((shares < 0.5).sum()) + 1
        inside = u.T @ delta @ vh.T
        inside[:leading] = 0
        inside[:, :leading] = 0
        for place in range(leading, rank):
            inside[place, place] = 0
        total = total + u @ inside @ vh
        mean = sum(float(entry.norm()) for entry in deltas[:stage]) / stage
    return total * mean / float(total.norm())


def swudi(deltas: Sequence[Tensor], layer: str, _: Sequence[Tensor]) -> Tensor:
    gram = sum(d.T @ d / d.norm() ** 2 for d in deltas)
    target = sum(d @ d.T @ d / d.norm() ** 2 for d in deltas)
    assert isinstance(gram, Tensor)
    ridge = 1e-3 * torch.linalg.eigvalsh(gram)[-1] * torch.eye(len(gram)).double()
    return target @ torch.linalg.inv(gram + ridge)


def ties(deltas: Sequence[Tensor], layer: str, _: Sequence[Tensor]) -> Tensor:
    kept = []
    for delta in deltas:
        least = delta.abs().flatten().sort(descending=True).values[round(0.2 * delta.numel()) - 1]
        kept.append(torch.where(delta.abs() >= least, delta, 0.0))
    result = torch.zeros_like(deltas[0])
    for row in range(result.shape[0]):
        for column in range(result.shape[1]):
            values = [float(entry[row, column]) for entry in kept]
            agree = [value for value in values if value * sum(values) > 0]
            result[row, column] = sum(agree) / len(agree) if agree else 0.0
    return result


def dare(deltas: Sequence[Tensor], layer: str, _: Sequence[Tensor]) -> Tensor:
    result = torch.zeros_like(deltas[0])
    for stage, delta in enumerate(deltas, start=1):
        generator = torch.Generator().manual_seed(seed_of(0, stage, layer))
        kept = torch.rand(delta.shape, generator=generator) >= 0.9
        result += torch.where(kept, delta / 0.1, 0.0) / stage
    return result


def magmax(deltas: Sequence[Tensor], layer: str, _: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(deltas))
    return stacked.gather(0, stacked.abs().argmax(0, keepdim=True))[0]


def became(deltas: Sequence[Tensor], layer: str, information: Sequence[Tensor]) -> Tensor:
    merged = deltas[0]
    for stage in (1, 2):
        delta, seen = deltas[stage], information[: stage + 1]
        weight = (information[stage] * delta**2).sum() / sum((f * delta**2).sum() for f in seen)
        merged = merged + weight * delta
    return merged


def perturb_and_merge(
    deltas: Sequence[Tensor], layer: str, information: Sequence[Tensor]
) -> Tensor:
    merged, tuned = deltas[0], [deltas[0]]
    for stage in (1, 2):
        delta, seen = deltas[stage], information[: stage + 1]
        tuned.append(merged + delta)
        below = sum((f * delta**2).sum() for f in seen)
        above = sum((f * (merged - own) * delta).sum() for f, own in zip(seen, tuned, strict=True))
        merged = merged + min(1.0, max(0.0, float(-above / below))) * delta
    return merged


CASES: dict[str, tuple[str, dict[str, Any], Dense]] = {
    "cma": ("cma", {}, weighted(1, 1 / 2, 1 / 3)),
    "scale 1/i": ("scale", {"rule": "1/i"}, weighted(1, 1 / 2, 1 / 3)),
    "scale 1/sqrt(i)": ("scale", {}, weighted(1, 2**-0.5, 3**-0.5)),
    "scale constant": ("scale", {"rule": "constant", "value": 0.3}, weighted(1, 0.3, 0.3)),
    "ema": ("ema", {"decay": 0.8}, weighted(1, 0.2, 0.2)),
    "task-arithmetic": ("task-arithmetic", {"value": 0.4}, weighted(0.4, 0.4, 0.4)),
    "slerp": ("slerp", {}, slerp),
    "became": ("fisher", {"per": "layer"}, became),
    "pm": ("fisher", {"per": "layer", "estimator": "pm"}, perturb_and_merge),
    "opcm": ("opcm", {}, opcm),
    "swudi": ("swudi", {}, swudi),
    "ties": ("ties", {}, ties),
    "dare": ("dare", {}, dare),
    "magmax": ("magmax", {}, magmax),
}


@pytest.mark.parametrize("layer", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_it_is_its_equation(case: str, layer: str, folders: dict[str, Path]) -> None:
    name, options, dense = CASES[case]
    product = folders["merged3"]
    expected = dense(trained_deltas(product, layer), layer, fishers(product, layer))
    found = update_of(product, name, options, layer)
    assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_every_method_is_tested() -> None:
    assert {name for name, _, _ in CASES.values()} == set(METHODS)


def test_layers_may_have_their_own_weight(folders: dict[str, Path]) -> None:
    options = {"rule": "constant", "value": 0.3, "layers": {"*.attn.*": 0.7}}
    product = folders["merged3"]
    for layer, weight in (("net.mlp.up", 0.3), ("net.attn.q", 0.7)):
        expected = weighted(1, weight, weight)(trained_deltas(product, layer), layer, [])
        torch.testing.assert_close(update_of(product, "scale", options, layer), expected)


def test_one_weight_for_the_whole_model(folders: dict[str, Path]) -> None:
    """Numerators and denominators are added over the layers before they are divided."""
    product = folders["merged2"]
    above = below = 0.0
    for layer in SHAPES:
        newest = trained_deltas(product, layer)[1]
        first, second = fishers(product, layer)
        above += float((second * newest**2).sum())
        below += float(((first + second) * newest**2).sum())
    merged = apply_method(product, read_manifest(product), open_method("fisher", {}), anew=True)
    assert float(merged.lineage[1].coefficient) == pytest.approx(above / below, rel=1e-6)
    assert merged.lineage[1].layers == {}


def test_orthogonal_deltas_are_added(tmp_path: Path) -> None:
    from mera_ds.merge.factors import LowRank
    from mera_ds.merge.methods.swudi import solve

    rows = torch.linalg.qr(torch.randn(10, 4).double())[0].T
    deltas = [LowRank(torch.randn(6, 2).double(), part) for part in rows.split(2)]
    expected = deltas[0].dense() + deltas[1].dense()
    torch.testing.assert_close(solve(deltas, 1e-12).dense(), expected)


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if kind.result != "dense"])
def test_what_is_stored_is_what_was_computed(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    method = open_method(name, {})
    reweight_product(folders["merged3"], tmp_path / "new", key="k", step="s", change=method)
    _, update = lineage_update(tmp_path / "new", read_manifest(tmp_path / "new"))
    for layer in SHAPES:
        terms = update(layer)
        assert not isinstance(terms, Tensor)
        expected = update_of(folders["merged3"], name, {}, layer)
        torch.testing.assert_close(sum_of(terms), expected, rtol=1e-5, atol=1e-5)


def test_a_dense_result_is_stored_with_its_error(folders: dict[str, Path], tmp_path: Path) -> None:
    errors = []
    for rank in (4, 12):
        method = open_method("magmax", {"rank": rank})
        folder = tmp_path / str(rank)
        reweight_product(folders["merged3"], folder, key="k", step="s", change=method)
        manifest = read_manifest(folder)
        _, update = lineage_update(folder, manifest)
        lost = whole = 0.0
        for layer in SHAPES:
            terms = update(layer)
            assert not isinstance(terms, Tensor)
            exact = update_of(folders["merged3"], "magmax", {}, layer)
            lost += float((sum_of(terms) - exact).norm()) ** 2
            whole += float(exact.norm()) ** 2
        assert manifest.lineage[-1].rank == rank
        errors.append(manifest.provenance["relative_error"])
        assert errors[-1] == pytest.approx((lost / whole) ** 0.5, rel=1e-3, abs=1e-5)
    assert errors[0] > 0.1
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tries", {}, "merge method 'tries' is unknown; did you mean 'ties'"),
        ("ties", {"densty": 1.0}, "key 'densty' is unknown; did you mean 'density'"),
        ("ties", {"density": 1.5}, "density is 1.5"),
        ("dare", {"drop": 1.0}, "drop is 1.0"),
        ("ema", {"decay": -0.1}, "decay is -0.1"),
        ("scale", {"rule": "1/j"}, r"valid: 1/i, 1/sqrt\(i\), constant"),
        ("swudi", {"filter": 0.0}, "filter is 0.0"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_method(name, options)


def test_a_pattern_that_fits_nothing(folders: dict[str, Path]) -> None:
    method = open_method("scale", {"layers": {"*.experts.*": 0.1}})
    with pytest.raises(InputError, match=r"'\*\.experts\.\*' fits no layer"):
        apply_method(folders["merged3"], read_manifest(folders["merged3"]), method, anew=True)
