"""The merge of a run whose backbone is tuned as a whole: the literal average of two HF folders."""

import dataclasses
import shutil
from fractions import Fraction
from pathlib import Path

from mera_ds.checkpoint import BACKBONE, NewBackbone, write_product
from mera_ds.errors import InputError
from mera_ds.manifest import FullStage, Manifest, read_manifest
from mera_ds.merge.state_dicts import carry_out, prepare_merge


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullMerge:
    """A tuned product, and the backbone that it is merged with."""

    tuned: Path
    previous: Path
    """HF folder of θ_{i−1}, which the product was tuned from."""
    previous_sha256: str
    """Identity of that backbone (`Manifest.backbone_sha256`)."""
    dtype: str
    """Of the merged weights, as safetensors names it."""


def merge_full_product(
    merge: FullMerge, output: Path, work: Path, *, key: str, step: str, stage: int, coefficient: str
) -> Manifest:
    """Write the merged model: the tuned one's connectors, and the average of both backbones.

    Args:
        merge: what is merged.
        output: the product to write.
        work: folder for the merged weights until the product holds them; a merge that was killed
            goes on with the files that are missing there.
        key: hash of the step's inputs.
        step: name of the step.
        stage: i; the tuned backbone counts 1/i.
        coefficient: 1/i, as the plan states it.

    Raises:
        InputError: if the product was tuned from another backbone, in another stage, or the two
            don't fit together.
    """
    newest = _newest(merge, stage)
    if Fraction(coefficient) != Fraction(1, stage):
        raise InputError(
            f"{step} weighs the tuned backbone by {coefficient}, and the average of stage {stage} "
            f"is 1/{stage}; make the plan again with 'mera-ds init'"
        )
    merged = work / BACKBONE
    shutil.rmtree(merged, ignore_errors=True)  # complete, but its product was not written
    tuned = merge.tuned / BACKBONE
    carry_out(prepare_merge(merge.previous, tuned, stage, merged, dtype=merge.dtype), merged)
    *older, _ = _stages(merge.tuned)
    stages = (*older, dataclasses.replace(newest, coefficient=coefficient))
    manifest = write_product(
        output,
        key=key,
        step=step,
        base_sha256=read_manifest(merge.tuned).base_sha256,
        previous=merge.tuned,
        backbone=NewBackbone(folder=merged, stages=stages),
        provenance={"merge": "cumulative moving average", "coefficient": coefficient},
    )
    shutil.rmtree(work)
    return manifest


def _stages(product: Path) -> tuple[FullStage, ...]:
    backbone = read_manifest(product).backbone
    return () if backbone is None else backbone.stages


def _newest(merge: FullMerge, stage: int) -> FullStage:
    stages = _stages(merge.tuned)
    if not stages or stages[-1].stage != stage or stages[-1].coefficient != "1":
        raise InputError(f"merge of stage {stage}: {merge.tuned} was not tuned in this stage")
    if stages[-1].parent != merge.previous_sha256:
        raise InputError(
            f"{merge.tuned} was tuned from the backbone {stages[-1].parent[:12]}, not from "
            f"{merge.previous} ({merge.previous_sha256[:12]}); restore that, or tune again"
        )
    return stages[-1]
