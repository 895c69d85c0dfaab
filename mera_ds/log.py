"""What a user sees while something runs: one console line, `metrics.jsonl`, TensorBoard."""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from mera_ds.machine import commit, hardware

PROCESSES = "processes.jsonl"
"""In a run: a line for every process that wrote figures, with the machine it ran on."""

logger = logging.getLogger("mera_ds")


def set_up_console(rank: int = 0) -> None:
    """Send our messages to standard error, from rank 0 only (warnings from every rank)."""
    handler = logging.StreamHandler()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    for noisy in ("DeepSpeed", "bitsandbytes", "transformers", "torch.distributed"):
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
        self._run = run
        self._folder = run / "tensorboard"
        self._events: EventFile | None = None
        self._failed = False
        self._introduced = False

    def __enter__(self) -> "Metrics":
        if self._enabled:
            with self._tolerant(self._folder):
                self._events = EventFile(self._folder)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._events is not None:
            with self._tolerant(self._folder):
                self._events.close()

    def write(self, name: str, step: int, values: dict[str, float]) -> None:
        """Append the figures of one step of the phase `name`."""
        if not self._enabled:
            return
        if not self._introduced:
            ranks = int(os.environ.get("WORLD_SIZE", "1"))
            facts = {"commit": commit(), "hardware": hardware(), "ranks": ranks}
            self._append(self._run / PROCESSES, facts)
            self._introduced = True
        self._append(self._run / "metrics.jsonl", {"name": name, "step": step, **values})
        if self._events is not None:
            with self._tolerant(self._folder):
                self._events.add(name, step, values)

    def write_text(self, name: str, step: int, text: str) -> None:
        """Show a text (Markdown) in TensorBoard."""
        if self._events is not None:
            with self._tolerant(self._folder):
                self._events.add_text(name, step, text)

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        """Append a line with the time."""
        line = json.dumps({**row, "time": round(time.time(), 3)}, ensure_ascii=False)
        with self._tolerant(path), path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    @contextmanager
    def _tolerant(self, target: Path) -> Iterator[None]:
        """Report the first failure to write, and go on."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                logger.warning("%s can't be written (%s); the work goes on", target, error)
            self._failed = True


class EventFile:
    """A TensorBoard event file, written at once.

    TensorBoard's own writer hands the work to a thread, which prints a traceback when the disk is
    full and can't be asked to go on.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._event = Event
        self._file = (folder / f"{name}.{time.monotonic_ns()}").open("wb")
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, name: str, step: int, values: dict[str, float]) -> None:
        """Append one scalar per value, tagged `<name>/<value's name>`."""
        event = self._event(wall_time=time.time(), step=step)
        for key, value in values.items():
            event.summary.value.add(tag=f"{name}/{key}", simple_value=value)
        self._write(event)

    def add_text(self, name: str, step: int, text: str) -> None:
        """Append a text, as TensorBoard's own `text_pb` lays it out."""
        from tensorboard.plugins.text.summary import text_pb

        event = self._event(wall_time=time.time(), step=step)
        event.summary.CopyFrom(text_pb(name, text))
        self._write(event)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()
