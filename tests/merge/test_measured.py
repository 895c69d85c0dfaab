"""Fisher information that was measured on data: kept with the deltas, used for all or none."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mera_ds.checkpoint import load_delta, load_tensors, read_manifest
from mera_ds.errors import DataError
from mera_ds.merge.fisher import marginals_from_moments
from mera_ds.merge.lineage import apply_method, merge_product_by
from mera_ds.merge.methods import open_method

from .conftest import SHAPES

METHOD = open_method("fisher", {"per": "layer"})


def squares(product: Path, stage: int) -> dict[str, Tensor]:
    """Return squared gradients of a stage's factors."""
    generator = torch.Generator().manual_seed(100 + stage)
    factors = load_delta(product, read_manifest(product).lineage[stage - 1])
    return {name: torch.rand(entry.shape, generator=generator) for name, entry in factors.items()}


def expected_weight(product: Path, layer: str) -> float:
    """Return BECAME's λ at stage 2, from dense matrices."""
    fishers = []
    for stage, entry in enumerate(read_manifest(product).lineage, start=1):
        factors = load_delta(product, entry)
        found = marginals_from_moments(factors, squares(product, stage), entry.scale)
        fishers.append((found[f"{layer}.rows"][:, None] * found[f"{layer}.columns"]).double())
    left, right = (factors[f"{layer}.lora_{side}"].double() for side in "BA")
    above, below = (float((f * (left @ right) ** 2).sum()) for f in (fishers[1], sum(fishers)))
    return above / below


def merged(folders: dict[str, Path], out: Path, *stages: int) -> Path:
    measured = {stage: squares(folders["tuned2"], stage) for stage in stages}
    facts = {"key": "k", "step": "s"}
    merge_product_by(METHOD, folders["tuned2"], out, stage=2, measured=measured, **facts)
    return out


def test_it_decides_the_weight_and_stays_with_the_deltas(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    product = merged(folders, tmp_path / "new", 1, 2)
    manifest = read_manifest(product)
    newest = manifest.lineage[-1]
    for layer in SHAPES:
        weight = float(newest.layers.get(layer, newest.coefficient))
        assert weight == pytest.approx(expected_weight(folders["tuned2"], layer), rel=1e-5)
    for entry in manifest.lineage:
        assert entry.measured is not None
        kept = load_tensors(product / entry.measured.file, entry.measured.sha256)
        sides = ("rows", "columns")
        assert kept.keys() == {f"{layer}.{side}" for layer in SHAPES for side in sides}
    again = apply_method(product, manifest, METHOD, anew=True).lineage[-1]
    assert (again.coefficient, again.layers) == (newest.coefficient, newest.layers)


def test_it_is_not_mixed_with_that_of_the_optimizer(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Gradients of batches and of single samples have other sizes."""
    plain = merged(folders, tmp_path / "adam")
    half = merged(folders, tmp_path / "half", 2)
    lineages = [read_manifest(product).lineage for product in (plain, half)]
    assert lineages[0][-1].layers == lineages[1][-1].layers
    assert lineages[0][-1].coefficient == lineages[1][-1].coefficient


def test_another_delta_s_gradients_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    wrong = {"net.mlp.up.lora_A": torch.ones(1, 1)}
    with pytest.raises(DataError, match="Fisher information of stage 2"):
        merge_product_by(
            METHOD,
            folders["tuned2"],
            tmp_path / "new",
            key="k",
            step="s",
            stage=2,
            measured={2: wrong},
        )
