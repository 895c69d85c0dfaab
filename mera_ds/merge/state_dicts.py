"""The literal merge: the average of two models on disk, whatever their size.

θ_{i−1} is an HF checkpoint folder; θ_tuned another one, or a LoRA adapter on the first. Both may be
cut into files in any way. The output is a complete HF folder. Memory is a few megabytes per thread;
a killed merge is continued by the same command, to the same bytes.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mera_ds.errors import InputError
from mera_ds.files import full_disk_is_an_error, require_space
from mera_ds.merge.card import Totals, complete, totals
from mera_ds.merge.partial import partial_folder, require_new
from mera_ds.merge.plan import MergePlan, plan_merge
from mera_ds.merge.rule import open_rule
from mera_ds.merge.workers import Progress, write_shards
from mera_ds.mergeconfig import CMA

SHARD_SIZE = 5_000_000_000
_SPARE_BYTES = 10_000_000


def default_workers() -> int:
    """Return how many threads a merge uses: memory bandwidth is used up by eight."""
    return min(8, os.cpu_count() or 1)


def prepare_merge(
    previous: Path,
    tuned: Path,
    stage: int,
    output: Path,
    *,
    shard_size: int = SHARD_SIZE,
    dtype: str | None = None,
    workers: int | None = None,
    method: str = CMA,
    options: Mapping[str, Any] = MappingProxyType({}),
    base: Path | None = None,
) -> MergePlan:
    """Check everything that can be checked without writing.

    Args:
        previous: θ_{i−1}, an HF checkpoint folder.
        tuned: θ_tuned, trained from it: an HF checkpoint folder, or a folder with a PEFT adapter.
        stage: i, at least 1.
        output: the folder to write; must not exist.
        shard_size: most bytes of tensors per file; a larger tensor has a file of its own.
        dtype: F32, F16 or BF16; None keeps each tensor's.
        workers: number of threads.
        method: how they are merged (see `mera_ds.merge.rule`).
        options: of the method.
        base: θ_0, an HF checkpoint folder, for methods that need it.

    Raises:
        InputError: if the models don't fit together or are not in order (all reasons are listed),
            the stage is not positive, the method can't be used, or the output exists.
        DataError: if a file can't be read.
    """
    if stage < 1:
        raise InputError(f"--stage is {stage}; stages count from 1")
    if shard_size < 1:
        raise InputError(f"--shard-size is {shard_size}; give a positive number of bytes")
    require_new(output)
    rule = open_rule(method, options, stage, base)
    if output.resolve() in (previous.resolve(), tuned.resolve()):
        raise InputError(f"--out is one of the inputs, {output}; choose another folder")
    workers = workers or default_workers()
    return plan_merge(previous, tuned, rule, shard_size=shard_size, dtype=dtype, workers=workers)


def carry_out(
    plan: MergePlan, output: Path, *, workers: int | None = None, progress: Progress | None = None
) -> Totals:
    """Write the merged model; continue where an earlier call was stopped.

    Raises:
        InputError: if the output exists, or an unfinished merge of other inputs is there.
        DataError: if a merged tensor is not finite.
        LockedError: if another process writes the same output.
        ResourceError: if the disk is too small.
    """
    workers = workers or default_workers()
    with partial_folder(output, plan) as partial, full_disk_is_an_error(output):
        left = partial.resume(workers)
        require_space(output.parent, sum(shard.size for shard in left) + _SPARE_BYTES)
        report = progress or _silent
        report(plan.output_bytes - sum(shard.size for shard in left))
        write_shards(plan, partial, left, workers, report)
        complete(partial.folder, plan, partial.records, workers)
        partial.publish(output)
        return totals(partial.records)


def _silent(written: int) -> None:
    """Take no notice of the progress."""


def merge_checkpoints(
    previous: Path,
    tuned: Path,
    stage: int,
    output: Path,
    shard_size: int = SHARD_SIZE,
    dtype: str | None = None,
) -> Path:
    """Write the cumulative moving average of two models as a complete HF folder; return it.

    Arguments and errors are those of `prepare_merge` and `carry_out`.
    """
    plan = prepare_merge(previous, tuned, stage, output, shard_size=shard_size, dtype=dtype)
    carry_out(plan, output)
    return output
