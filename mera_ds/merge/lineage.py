"""The merge as a change of one coefficient.

θ_tuned = θ_{i−1} + Δ_i, so (i−1)/i · θ_{i−1} + 1/i · θ_tuned = θ_{i−1} + Δ_i / i: exact, without
touching a weight, and it can be changed later.
"""

import dataclasses
from fractions import Fraction
from pathlib import Path

from mera_ds.checkpoint import DeltaEntry, Manifest, read_manifest, write_product
from mera_ds.errors import InputError


def merged_lineage(manifest: Manifest, stage: int, coefficient: Fraction) -> tuple[DeltaEntry, ...]:
    """Return the lineage with the newest delta's coefficient set.

    Args:
        manifest: of the tuned model.
        stage: the stage that was just tuned.
        coefficient: its weight, e.g. 1/i for the cumulative moving average.

    Raises:
        InputError: if the newest delta is not that of this stage, or was merged before.
    """
    if not manifest.lineage or manifest.lineage[-1].stage != stage:
        raise InputError(
            f"merge of stage {stage}: the newest delta of the tuned model is that of stage "
            f"{manifest.lineage[-1].stage if manifest.lineage else 'none'}; give the model that "
            f"was tuned in stage {stage}"
        )
    *older, newest = manifest.lineage
    if Fraction(newest.coefficient) != 1:
        raise InputError(
            f"merge of stage {stage}: the delta has the coefficient {newest.coefficient} already"
        )
    return (*older, dataclasses.replace(newest, coefficient=str(coefficient)))


def merge_product(
    tuned: Path, output: Path, *, key: str, step: str, stage: int, coefficient: str
) -> Manifest:
    """Write the merged model: the tuned one's files, with one coefficient changed."""
    manifest = read_manifest(tuned)
    return write_product(
        output,
        key=key,
        step=step,
        base_sha256=manifest.base_sha256,
        previous=tuned,
        lineage=merged_lineage(manifest, stage, Fraction(coefficient)),
        provenance={"merge": "cumulative moving average", "coefficient": coefficient},
    )
