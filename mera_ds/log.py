"""What a user sees while something runs: one console line, `metrics.jsonl`, TensorBoard."""

import json
import logging
import time
from pathlib import Path
from types import TracebackType
from typing import Any

logger = logging.getLogger("mera_ds")


def set_up_console(rank: int = 0) -> None:
    """Send our messages to standard error, from rank 0 only (warnings from every rank)."""
    handler = logging.StreamHandler()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    for noisy in ("DeepSpeed", "transformers", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def format_duration(seconds: float) -> str:
    """Return `42 s`, `3 min 05 s` or `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Metrics:
    """Appends figures to `metrics.jsonl` and TensorBoard; a failing disk never stops training."""

    def __init__(self, run: Path, enabled: bool) -> None:
        self._enabled = enabled
        self._path = run / "metrics.jsonl"
        self._folder = run / "tensorboard"
        self._writer: Any = None
        self._failed = False

    def __enter__(self) -> "Metrics":
        if self._enabled:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, name: str, step: int, values: dict[str, float]) -> None:
        """Append the figures of one step of the phase `name`."""
        if not self._enabled:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                row = {"name": name, "step": step, "time": round(time.time(), 3), **values}
                file.write(json.dumps(row) + "\n")
            for key, value in values.items():
                self._writer.add_scalar(f"{name}/{key}", value, step)
        except OSError as error:
            if not self._failed:
                logger.warning("%s can't be written (%s); training goes on", self._path, error)
            self._failed = True
