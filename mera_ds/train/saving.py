"""Saving while the training goes on: the state is copied to the host, and a thread writes it.

One checkpoint is written at a time: whoever saves again before the last one is on the disk waits
for it. So there are never more than one copy of the state, and no queue.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from mera_ds.config import ExecutionConfig
from mera_ds.distributed import World, main_rank_first
from mera_ds.log import logger
from mera_ds.train.engine import EngineState
from mera_ds.train.state import Progress, save_checkpoint


class Saver:
    """Writes the checkpoints of one phase; leaving the block waits for the last one."""

    def __init__(self, folder: Path, key: str, execution: ExecutionConfig, world: World) -> None:
        self._folder = folder
        self._key = key
        self._execution = execution
        self._world = world
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._told = False

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)
        if self._writing is not None and self._writing.exception() is not None:
            logger.warning("the last checkpoint was not written: %s", self._writing.exception())

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written; then all ranks are to call `finish`."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def save(self, state: Callable[[], EngineState], progress: Progress) -> None:
        """Save a state, in the background or at once; every rank must call it.

        Args:
            state: returns the state; called on every rank, when the last one is written.
            progress: where the phase stands.

        Raises:
            ResourceError: on every rank, if the disk is full; earlier checkpoints stay.
            DataError: on every rank, if a value is not finite.
        """
        self.finish()
        copied = state()
        if self._world.is_main:
            self._writing = self._pool.submit(self._write, progress, copied)
        if self._execution.saving == "blocking":
            self.finish()

    def finish(self) -> None:
        """Wait until the last checkpoint is written; every rank must call it.

        Raises:
            MeraError: on every rank, what writing it raised.
        """
        with main_rank_first(self._world) as mine:
            writing, self._writing = self._writing, None
            if mine and writing is not None:
                writing.result()

    def _write(self, progress: Progress, state: EngineState) -> None:
        began = time.monotonic()
        execution = self._execution
        size = save_checkpoint(
            *(self._folder, self._key, progress, state),
            keep=execution.keep_checkpoints,
            keep_every=execution.keep_every,
        )
        if not self._told:
            self._told = True
            logger.info(
                "a checkpoint takes %.1f MB and %.1f s to write; %d are kept%s",
                *(size / 1e6, time.monotonic() - began, execution.keep_checkpoints),
                f", and each of {execution.keep_every} steps" if execution.keep_every else "",
            )
