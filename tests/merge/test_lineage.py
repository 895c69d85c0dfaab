"""The merge as a change of one coefficient, and what it refuses."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from mera_ds.checkpoint import Manifest, NewDelta, read_manifest, write_product
from mera_ds.errors import InputError
from mera_ds.merge.lineage import merge_product, merged_lineage

FACTS: dict[str, Any] = {"key": "key", "step": "step"}


def tune(folder: Path, stage: int, previous: Path | None) -> Manifest:
    """Write a product as if a stage had been tuned from another."""
    generator = torch.Generator().manual_seed(stage)
    tensors = {name: torch.randn(4, 4, generator=generator) for name in ("l.lora_A", "l.lora_B")}
    delta = NewDelta(stage=stage, modality=f"m{stage}", scale=2.0, rank=4, tensors=tensors)
    connectors = {f"m{stage}": {"w": torch.randn(2, generator=generator)}}
    return write_product(
        folder, **FACTS, base_sha256="b", previous=previous, delta=delta, connectors=connectors
    )


def merge(tuned: Path, output: Path, stage: int) -> Manifest:
    return merge_product(tuned, output, **FACTS, stage=stage, coefficient=f"1/{stage}")


@pytest.fixture
def chain(tmp_path: Path) -> dict[str, Path]:
    """Return the tuned and merged products of three stages."""
    folders: dict[str, Path] = {}
    previous = None
    for stage in (1, 2, 3):
        tuned, merged = (tmp_path / f"{kind}{stage}" for kind in ("tuned", "merged"))
        tune(tuned, stage, previous)
        merge(tuned, merged, stage)
        folders |= {tuned.name: tuned, merged.name: merged}
        previous = merged
    return folders


def test_each_delta_counts_one_by_its_stage(chain: dict[str, Path]) -> None:
    manifest = read_manifest(chain["merged3"])
    assert [entry.coefficient for entry in manifest.lineage] == ["1", "1/2", "1/3"]
    assert [entry.weight for entry in manifest.lineage] == [2.0, 1.0, float(Fraction(1, 3)) * 2]
    assert [entry.stage for entry in manifest.lineage] == [1, 2, 3]


def test_no_tensor_changes(chain: dict[str, Path]) -> None:
    tuned, merged = read_manifest(chain["tuned3"]), read_manifest(chain["merged3"])
    assert merged.connectors == tuned.connectors
    assert [e.sha256 for e in merged.lineage] == [e.sha256 for e in tuned.lineage]
    for entry in [*merged.lineage, *merged.connectors.values()]:
        pair = [chain[name] / entry.file for name in ("tuned3", "merged3")]
        assert pair[0].stat().st_ino == pair[1].stat().st_ino


def test_the_backbone_gets_another_name(chain: dict[str, Path]) -> None:
    names = {name: read_manifest(folder).backbone_sha256 for name, folder in chain.items()}
    assert names["merged1"] == names["tuned1"]
    assert len(set(names.values())) == 5
    assert read_manifest(chain["tuned3"]).lineage[-1].parent == names["merged2"]


def test_merging_again_gives_the_same_to_the_byte(chain: dict[str, Path], tmp_path: Path) -> None:
    merge(chain["tuned2"], tmp_path / "again", 2)
    for path in chain["merged2"].rglob("*.*"):
        again = tmp_path / "again" / path.relative_to(chain["merged2"])
        assert again.read_bytes() == path.read_bytes()


class TestOrder:
    def test_a_merged_model_is_not_merged_again(
        self, chain: dict[str, Path], tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match=r"stage 2: the delta has the coefficient 1/2 already"):
            merge(chain["merged2"], tmp_path / "twice", 2)

    @pytest.mark.parametrize("stage", [1, 3, 4])
    def test_another_stage_is_refused(
        self, chain: dict[str, Path], tmp_path: Path, stage: int
    ) -> None:
        message = rf"merge of stage {stage}: the newest delta .* is that of stage 2"
        with pytest.raises(InputError, match=message):
            merge(chain["tuned2"], tmp_path / "wrong", stage)

    def test_a_model_without_a_delta_is_refused(self, tmp_path: Path) -> None:
        connectors = {"m1": {"w": torch.ones(1)}}
        write_product(
            tmp_path / "bare", **FACTS, base_sha256="b", previous=None, connectors=connectors
        )
        with pytest.raises(InputError, match="is that of stage none"):
            merge(tmp_path / "bare", tmp_path / "out", 1)

    def test_nothing_is_written_then(self, chain: dict[str, Path], tmp_path: Path) -> None:
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(InputError):
            merge(chain["merged3"], tmp_path / "out", 3)
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_coefficient_is_exact(chain: dict[str, Path]) -> None:
    """Three thirds are one; as floats they are not always."""
    entry = merged_lineage(read_manifest(chain["tuned3"]), 3, Fraction(1, 3))[-1]
    assert 3 * Fraction(entry.coefficient) == 1
