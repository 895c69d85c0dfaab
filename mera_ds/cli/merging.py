"""`launch/merge.py` with two models on disk: arguments, the plan in print, progress, the report."""

import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mera_ds.errors import InputError
from mera_ds.files import require_space
from mera_ds.log import format_duration
from mera_ds.mergeconfig import CMA

if TYPE_CHECKING:  # numpy is loaded with one thread per thread of ours, so not before it is needed
    from mera_ds.merge.plan import MergePlan

_DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_DTYPES |= {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SECONDS_BETWEEN_LINES = 0.2


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for merging two models on disk."""
    group = parser.add_argument_group("merging any two models")
    group.add_argument("--previous", type=Path, help="HF checkpoint folder of the previous stage")
    group.add_argument(
        "--tuned", type=Path, help="HF checkpoint folder trained from it, or a LoRA adapter's"
    )
    group.add_argument("--stage", type=int, help="number of the stage, from 1")
    group.add_argument("--out", type=Path, help="folder to write")
    group.add_argument(
        "--method", default=CMA, help=f"how (default: {CMA}); OPTION=VALUE sets its options"
    )
    group.add_argument(
        "--base", type=Path, help="HF checkpoint folder of the model before the first stage"
    )
    group.add_argument("--shard-size", default="5GB", help="most bytes per output file, e.g. 500MB")
    group.add_argument("--dtype", choices=_DTYPES, help="of the output; default: the input's")
    group.add_argument("--workers", type=int, help="threads; default: one per core, at most 8")
    group.add_argument("--dry-run", action="store_true", help="check and print the plan only")
    group.add_argument(
        "--check-logits", action="store_true", help="compare with the merge before rounding"
    )
    group.add_argument("--prompts", type=Path, help="text file for that, one prompt a line")


def merge_folders(arguments: argparse.Namespace) -> None:
    """Merge two models on disk."""
    for name in ("previous", "tuned", "stage", "out"):
        if getattr(arguments, name) is None:
            raise InputError(f"--{name} is missing; give --previous, --tuned, --stage and --out")
    workers = arguments.workers
    if workers is not None and workers < 1:
        raise InputError(f"--workers is {workers}; give at least 1")
    # Our threads are the only ones: those of the libraries would compete with them.
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ[f"{library}_NUM_THREADS"] = "1"
    if not arguments.dry_run:
        from mera_ds.merge.libtorch import load_meanwhile

        load_meanwhile()
    from mera_ds.merge.state_dicts import carry_out, prepare_merge

    plan = prepare_merge(
        arguments.previous,
        arguments.tuned,
        arguments.stage,
        arguments.out,
        shard_size=_bytes(arguments.shard_size),
        dtype=_DTYPES.get(arguments.dtype),
        workers=workers,
        method=arguments.method,
        options=_options(arguments.overrides),
        base=arguments.base,
    )
    for note in plan.notes:
        print(f"note: {note}")
    prompts = _prompts(arguments)
    if prompts:
        from mera_ds.merge.logits import require_tokenizer

        require_tokenizer(plan)
    if arguments.dry_run:
        _print_plan(plan, arguments.out)
        return
    progress = _ProgressBar(plan.output_bytes)
    try:
        totals = carry_out(plan, arguments.out, workers=workers, progress=progress.add)
    finally:
        progress.close()
    print(f"merged: {arguments.out} ({_size(plan.output_bytes)}, {progress.speed()})")
    for line in totals.lines():
        print(line)
    if prompts is not None:
        from mera_ds.merge.logits import compare_logits

        for line in compare_logits(plan, arguments.out, prompts):
            print(line)


def _options(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the method's options; what reads them is imported only where there are any."""
    if not overrides:
        return {}
    from mera_ds.settings import apply_overrides

    return apply_overrides({}, overrides)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B|)", text.strip().upper())
    if match is None:
        raise InputError(f"--shard-size {text}: give bytes, or e.g. 500MB or 5GB")
    return int(float(match[1]) * _UNITS[match[2]])


def _prompts(arguments: argparse.Namespace) -> list[str] | None:
    """Return the prompts of the logit check; an empty list for the built-in ones, None for none."""
    if arguments.prompts is None:
        return [] if arguments.check_logits else None
    try:
        lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {arguments.prompts} can't be read ({error})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"--prompts {arguments.prompts} holds no prompt; write one a line")
    return prompts


def _print_plan(plan: "MergePlan", output: Path) -> None:
    """Print what would be done."""
    changed = sum(tensor.new is not None for tensor in plan.tensors)
    dtypes = sorted({tensor.dtype for tensor in plan.tensors})
    from mera_ds.merge.card import equation

    print(f"stage {plan.stage}: {equation(plan)}")
    print(f"previous  {plan.previous}")
    print(f"tuned     {plan.tuned}{' (LoRA adapter)' if plan.adapter else ''}")
    print(f"tensors   {len(plan.tensors)}, {changed} to be merged; written as {', '.join(dtypes)}")
    print(f"read      {_size(plan.input_bytes)}")
    print(f"write     {_size(plan.output_bytes)} to {output}")
    for shard in plan.shards:
        print(f"          {shard.file}  {_size(shard.size)}  {len(shard.tensors)} tensors")
    existing = output.absolute().parent
    while not existing.exists():
        existing = existing.parent
    print(f"free      {_size(shutil.disk_usage(existing).free)}")
    require_space(output.absolute().parent, plan.output_bytes)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**7 else f"{count / 1e3:.1f} KB"


class _ProgressBar:
    """One line on a terminal: share, bytes, speed and time left."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._start = time.monotonic()
        self._shown = self._start
        self._first: int | None = None
        self._written = 0
        self._visible = sys.stderr.isatty()

    def add(self, written: int) -> None:
        """Count bytes of the output; the first call says how many were there before."""
        if self._first is None:
            self._first = written
        self._written += written
        now = time.monotonic()
        if self._visible and now - self._shown >= _SECONDS_BETWEEN_LINES:
            self._shown = now
            self._draw(now)

    def _draw(self, now: float) -> None:
        speed = self._speed(now)
        left = (self._total - self._written) / speed if speed else 0.0
        done = self._written / max(self._total, 1)
        bar = "█" * round(20 * done)
        sys.stderr.write(
            f"\r{bar:░<20} {100 * done:3.0f} %  {self._written / 1e9:.2f} of "
            f"{self._total / 1e9:.2f} GB  {speed / 1e9:.2f} GB/s  "
            f"{format_duration(left)} left \x1b[K"
        )
        sys.stderr.flush()

    def _speed(self, now: float) -> float:
        return (self._written - (self._first or 0)) / max(now - self._start, 1e-9)

    def speed(self) -> str:
        """Return the mean speed so far."""
        return f"{self._speed(time.monotonic()) / 1e9:.2f} GB/s"

    def close(self) -> None:
        """Clear the line."""
        if self._visible:
            sys.stderr.write("\r\x1b[K")
