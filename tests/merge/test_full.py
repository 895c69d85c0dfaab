"""Merging products whose backbones were tuned as a whole."""

import dataclasses
from pathlib import Path

import pytest
import torch

from mera_ds.checkpoint import FullStage, NewBackbone, write_product
from mera_ds.errors import InputError
from mera_ds.files import link_or_copy, read_json
from mera_ds.manifest import read_manifest
from mera_ds.merge.full import FullMerge, merge_full_product

from .models import base_model, checkpoint, moved, state

BASE = "b" * 64
PARENT = "p" * 64


@pytest.fixture
def merge(tmp_path: Path) -> FullMerge:
    """Return a product that was tuned in stage 3, and the backbone before it."""
    previous = checkpoint(tmp_path / "previous", base_model())
    tuned = checkpoint(tmp_path / "weights", moved(base_model(), 1), "20KB")
    stages = (
        FullStage(stage=2, modality="video", coefficient="1/2", parent="0" * 64),
        FullStage(stage=3, modality="audio", coefficient="1", parent=PARENT),
    )
    write_product(
        tmp_path / "tuned",
        key="k",
        step="03-audio/tune",
        base_sha256=BASE,
        previous=None,
        connectors={"audio": {"w": torch.ones(2)}},
        backbone=NewBackbone(folder=tuned, stages=stages),
    )
    return FullMerge(
        tuned=tmp_path / "tuned", previous=previous, previous_sha256=PARENT, dtype="BF16"
    )


def _merge(merge: FullMerge, stage: int = 3, coefficient: str = "1/3") -> Path:
    output, work = merge.tuned.with_name("merged"), merge.tuned.with_name("merge")
    facts = {"key": "key", "step": "03-audio/merge"}
    merge_full_product(merge, output, work, **facts, stage=stage, coefficient=coefficient)
    assert not work.exists()
    return output


def test_the_average_replaces_the_tuned_backbone(merge: FullMerge) -> None:
    output = _merge(merge)
    old, new, found = (
        state(folder) for folder in (merge.previous, merge.tuned / "backbone", output / "backbone")
    )
    assert old.keys() == new.keys() == found.keys()
    for name, tensor in found.items():
        exact = old[name].double() * 2 / 3 + new[name].double() / 3
        assert torch.equal(tensor, exact.float().bfloat16()), name
    manifest = read_manifest(output)
    assert manifest.backbone is not None
    assert [stage.coefficient for stage in manifest.backbone.stages] == ["1/2", "1/3"]
    assert manifest.backbone_sha256 != read_manifest(merge.tuned).backbone_sha256
    assert list(manifest.connectors) == ["audio"]
    assert read_json(output / "backbone/config.json")["dtype"] == "bfloat16"


def test_a_complete_average_without_its_product_is_made_again(merge: FullMerge) -> None:
    """As if it had been killed in between; what is there could be of other weights."""
    left = merge.tuned.with_name("merge") / "backbone"
    for path in merge.previous.iterdir():
        link_or_copy(path, left / path.name)
    found = state(_merge(merge) / "backbone")
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())


def test_it_must_have_been_tuned_from_that_backbone(merge: FullMerge) -> None:
    other = dataclasses.replace(merge, previous_sha256="o" * 64)
    with pytest.raises(InputError, match=r"was tuned from the backbone pppppp.*, not from .*oooo"):
        _merge(other)


def test_it_must_have_been_tuned_in_that_stage(merge: FullMerge) -> None:
    with pytest.raises(InputError, match=r"merge of stage 4: .*tuned was not tuned in this stage"):
        _merge(merge, 4, "1/4")
    with pytest.raises(InputError, match=r"merge of stage 3: .*merged was not tuned"):
        _merge(dataclasses.replace(merge, tuned=_merge(merge)))


def test_another_coefficient_is_refused(merge: FullMerge) -> None:
    with pytest.raises(InputError, match=r"weighs the tuned backbone by 1/2, and .* is 1/3"):
        _merge(merge, coefficient="1/2")
    assert not merge.tuned.with_name("merged").exists()
