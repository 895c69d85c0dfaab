"""The merge as a change of one coefficient, and what it refuses."""

import dataclasses
import json
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from mera_ds.checkpoint import Manifest, NewDelta, read_manifest, write_product
from mera_ds.errors import InputError
from mera_ds.manifest import check_chain, check_lineage
from mera_ds.merge.export import lineage_update
from mera_ds.merge.lineage import (
    merge_product,
    merge_product_by,
    merged_lineage,
    reweight_product,
    undo_product,
)
from mera_ds.merge.methods import Method, open_method

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


class TestChain:
    """A delta fits only where it was trained."""

    def test_merged_and_reweighted_lineages_are_sound(
        self, chain: dict[str, Path], tmp_path: Path
    ) -> None:
        for folder in chain.values():
            check_lineage(folder, read_manifest(folder), "b")
        manifest = reweight(chain["merged3"], tmp_path / "new", {"m1": "1/2"})
        check_lineage(tmp_path / "new", manifest, "b")

    def test_another_base_is_refused(self, chain: dict[str, Path]) -> None:
        with pytest.raises(InputError, match="was trained on the backbone b, but the configured"):
            check_lineage(chain["merged3"], read_manifest(chain["merged3"]), "c")

    @pytest.mark.parametrize("order", [(1, 0, 2), (0, 2), (1, 2), (0, 2, 1)])
    def test_deltas_missing_or_in_another_order_are_refused(
        self, order: tuple[int, ...], chain: dict[str, Path]
    ) -> None:
        manifest = read_manifest(chain["merged3"])
        changed = tuple(manifest.lineage[place] for place in order)
        with pytest.raises(InputError, match="a delta only fits where it was trained"):
            check_chain(chain["merged3"], dataclasses.replace(manifest, lineage=changed))

    def test_a_coefficient_changed_by_hand_is_refused(self, chain: dict[str, Path]) -> None:
        manifest = read_manifest(chain["merged3"])
        first = dataclasses.replace(manifest.lineage[0], coefficient="1/2")
        changed = dataclasses.replace(manifest, lineage=(first, *manifest.lineage[1:]))
        with pytest.raises(InputError, match=r"delta of stage 2 \(m2\) was trained on"):
            check_chain(chain["merged3"], changed)

    def test_a_delta_of_another_chain_is_refused(
        self, chain: dict[str, Path], tmp_path: Path
    ) -> None:
        """Its record of what it was trained on doesn't make it fit."""
        other = reweight(chain["merged3"], tmp_path / "new", {"m1": "1/2"})
        strange = dataclasses.replace(other.lineage[0], sha256="f" * 64)
        changed = dataclasses.replace(other, lineage=(strange, *other.lineage[1:]))
        with pytest.raises(InputError, match="a delta only fits where it was trained"):
            check_chain(tmp_path / "new", changed)

    def test_a_model_with_a_broken_chain_is_not_merged(
        self, chain: dict[str, Path], tmp_path: Path
    ) -> None:
        path = chain["tuned3"] / "manifest.json"
        facts = json.loads(path.read_text())
        facts["lineage"][0]["coefficient"] = "1/5"
        path.write_text(json.dumps(facts))
        with pytest.raises(InputError, match="restore the lineage"):
            merge(chain["tuned3"], tmp_path / "out", 3)
        assert not (tmp_path / "out").exists()

    def test_a_stage_can_be_trained_on_a_reweighted_model(
        self, chain: dict[str, Path], tmp_path: Path
    ) -> None:
        before = reweight(chain["merged2"], tmp_path / "new", {"m1": "1/2"})
        tuned = tune(tmp_path / "tuned", 3, tmp_path / "new")
        assert tuned.lineage[-1].parent == before.backbone_sha256
        manifest = merge(tmp_path / "tuned", tmp_path / "merged", 3)
        check_chain(tmp_path / "merged", manifest)
        again = reweight(tmp_path / "merged", tmp_path / "again", {"m1": "1"})
        check_chain(tmp_path / "again", again)

    def test_replaced_factors_keep_the_chain(self, chain: dict[str, Path], tmp_path: Path) -> None:
        for name in ("opcm", "swudi"):
            manifest = reweight(chain["merged3"], tmp_path / name, open_method(name, {}))
            check_chain(tmp_path / name, manifest)
            newest = manifest.lineage[-1]
            assert newest.trained is not None
            assert newest.trained.sha256 == read_manifest(chain["merged3"]).lineage[-1].sha256
            back = reweight(tmp_path / name, tmp_path / f"{name}-cma", open_method("cma", {}))
            assert back.backbone_sha256 == read_manifest(chain["merged3"]).backbone_sha256


class TestReweight:
    def test_only_coefficients_change(self, chain: dict[str, Path], tmp_path: Path) -> None:
        before = {path: path.read_bytes() for path in chain["merged3"].rglob("*.*")}
        manifest = reweight(chain["merged3"], tmp_path / "new", {"m1": "0.25", "m3": "2/3"})
        assert [entry.coefficient for entry in manifest.lineage] == ["1/4", "1/2", "2/3"]
        assert manifest.connectors == read_manifest(chain["merged3"]).connectors
        for entry in manifest.lineage:
            assert (tmp_path / "new" / entry.file).samefile(chain["merged3"] / entry.file)
        assert {path: path.read_bytes() for path in chain["merged3"].rglob("*.*")} == before

    def test_and_back_again_is_the_same_model(self, chain: dict[str, Path], tmp_path: Path) -> None:
        reweight(chain["merged3"], tmp_path / "new", {"m1": "0", "m2": "7"})
        back = reweight(tmp_path / "new", tmp_path / "back", {"m1": "1", "m2": "0.5"})
        assert back.model_sha256 == read_manifest(chain["merged3"]).model_sha256
        assert [entry.trained_on for entry in back.lineage] == [(), (), ()]

    def test_it_takes_less_than_a_second(self, chain: dict[str, Path], tmp_path: Path) -> None:
        started = time.process_time()
        reweight(chain["merged3"], tmp_path / "new", {"m1": "1/2"})
        assert time.process_time() - started < 1

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"m4": "1"}, "modality 'm4' is unknown"),
            ({"m1": "half"}, "'half' is no number"),
            ({"m1": "1/0"}, "'1/0' is no number"),
            ({"m1": "nan"}, "'nan' is no number"),
            ({"m1": "1e400"}, "'1e400' is no number"),
        ],
    )
    def test_bad_input(
        self, change: dict[str, str], message: str, chain: dict[str, Path], tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match=message):
            reweight(chain["merged3"], tmp_path / "new", change)
        assert not (tmp_path / "new").exists()


class TestMergeStep:
    @pytest.mark.parametrize("name", ["scale", "opcm", "swudi"])
    def test_step_by_step_is_all_at_once(
        self, name: str, chain: dict[str, Path], tmp_path: Path
    ) -> None:
        """A run that merges by a method at every stage ends as if re-merged by it at the end."""
        method, previous = open_method(name, {}), chain["tuned1"]
        for stage in (2, 3):
            tune(tmp_path / f"t{stage}", stage, previous)
            previous = tmp_path / f"m{stage}"
            merged = merge_product_by(
                method, tmp_path / f"t{stage}", previous, **FACTS, stage=stage
            )
            check_chain(previous, merged)
        anew = reweight(previous, tmp_path / "anew", method)
        for one, other in zip(merged.lineage, anew.lineage, strict=True):
            assert float(Fraction(one.coefficient)) == pytest.approx(
                float(Fraction(other.coefficient)), rel=1e-6
            )
        assert dense(previous) == pytest.approx(dense(tmp_path / "anew"), rel=1e-4, abs=1e-5)

    def test_a_merged_model_is_not_merged_again(
        self, chain: dict[str, Path], tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match="has the coefficient 1/3 already"):
            merge_product_by(
                open_method("opcm", {}), chain["merged3"], tmp_path / "x", **FACTS, stage=3
            )


def dense(product: Path) -> list[float]:
    """Return the update of the backbone."""
    _, update = lineage_update(product, read_manifest(product))
    total = torch.zeros(4, 4)
    terms = update("l")
    assert not isinstance(terms, torch.Tensor)
    for weight, left, right in terms:
        total += weight * left @ right
    return total.flatten().tolist()


class TestUndo:
    def test_it_is_the_model_before(self, chain: dict[str, Path], tmp_path: Path) -> None:
        parents = [chain["tuned2"], chain["merged2"]]
        manifest = undo(chain["merged3"], tmp_path / "undone", parents)
        assert manifest.model_sha256 == read_manifest(chain["merged2"]).model_sha256

    def test_without_its_product_the_rest_stays(
        self, chain: dict[str, Path], tmp_path: Path
    ) -> None:
        manifest = undo(chain["merged3"], tmp_path / "undone", [])
        assert manifest.model_sha256 == read_manifest(chain["merged2"]).model_sha256
        names = {path.name for path in (tmp_path / "undone").rglob("*.safetensors")}
        assert names == {
            "m1.safetensors",
            "m2.safetensors",
            "01-m1.safetensors",
            "02-m2.safetensors",
        }

    def test_a_first_stage_can_not_be_undone(self, chain: dict[str, Path], tmp_path: Path) -> None:
        with pytest.raises(InputError, match="has one stage only"):
            undo(chain["merged1"], tmp_path / "undone", [])


def reweight(product: Path, output: Path, change: dict[str, str] | Method) -> Manifest:
    return reweight_product(product, output, **FACTS, change=change)


def undo(product: Path, output: Path, parents: list[Path]) -> Manifest:
    return undo_product(product, output, **FACTS, parents=parents)
