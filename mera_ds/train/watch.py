"""Ranks that watch each other, so that one which dies or hangs brings all down, by name.

Each rank keeps a small file in the phase's folder that says where it is: the step, what it does,
the samples. A thread renews the file's time every second, as a sign of life, and looks at those of
the others. If one has shown none for `execution.timeout_seconds`, or this rank's own work has not
got on for so long, the rank says which one it was and ends with the status of a `RankError`; what
can't end by itself, its guardian kills. When the launcher is gone, the rank saves and stops.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from mera_ds.distributed import World, gather, main_rank_first
from mera_ds.errors import InputError, RankError
from mera_ds.files import full_disk_is_an_error, read_json
from mera_ds.log import logger
from mera_ds.settings import parse
from mera_ds.train import guardian

FOLDER = "ranks"
BEAT_SECONDS = 1.0
_ACCUSE_SECONDS = 3 * BEAT_SECONDS
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
"""Variables that torchrun and deepspeed give the ranks they start."""
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank is."""

    host: str
    process: int
    marks: int = 0
    """How often it has got on; ranks at the same point have the same number."""
    step: int | None = None
    """None before and behind the steps, where work may take any time."""
    work: str = "preparing"
    samples: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return it in words."""
        where = self.work if self.step is None else f"{self.work} at step {self.step}"
        samples = f" with {', '.join(self.samples)}" if self.samples else ""
        return f"process {self.process} on {self.host}, {where}{samples}"


class Watch:
    """Watches the ranks of a phase while it is entered; every rank must enter it."""

    def __init__(self, folder: Path, world: World, seconds: float) -> None:
        """Remember what to watch.

        Args:
            folder: the phase's folder, which all ranks see.
            world: this process among the ranks.
            seconds: how long a rank may show no sign of life.
        """
        self._folder = folder / FOLDER
        self._world = world
        self._seconds = seconds
        self._place = Place(host=socket.gethostname(), process=os.getpid())
        self._got_on = time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._guardian: subprocess.Popen[bytes] | None = None
        launched = any(name in os.environ for name in _LAUNCHERS)
        self._launcher = os.getppid() if launched else None
        self._orphan_since: float | None = None

    @property
    def launcher_is_gone(self) -> bool:
        """Whether the launcher was killed, so that nobody would stop the ranks any more."""
        return self._orphan_since is not None

    def __enter__(self) -> "Watch":
        """Begin to watch."""
        with main_rank_first(self._world) as mine, full_disk_is_an_error(self._folder):
            if mine:
                shutil.rmtree(self._folder, ignore_errors=True)  # of ranks that were killed
            if mine and self._world.size > 1:
                self._folder.mkdir(parents=True)
        if self._world.size > 1:
            self._write()
            gather(None)
            self._guardian = self._start_guardian()
        if self._world.size > 1 or self._launcher is not None:
            self._thread.start()
        return self

    def _start_guardian(self) -> subprocess.Popen[bytes]:
        words = [str(self._world.rank), str(self._seconds), str(self._file(self._world.rank))]
        return subprocess.Popen(
            [sys.executable, "-I", "-S", guardian.__file__, *words], stdin=subprocess.PIPE
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop watching; if a collective operation failed because a rank is gone, name it."""
        if isinstance(error, RuntimeError) and self._world.size > 1:
            self._accuse()
        self._left.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._guardian is not None:
            self._guardian.kill()  # loader processes may hold its input open
            self._guardian.wait()
        self._file(self._world.rank).unlink(missing_ok=True)
        with suppress(OSError):  # by the last
            self._folder.rmdir()

    def mark(self, step: int | None, work: str, samples: Sequence[str] | None = None) -> None:
        """Say that this rank has got on.

        Args:
            step: number of the step; None where the work may take any time.
            work: what is done now.
            samples: the ids of what it is done to; None: as before.
        """
        self._got_on = time.monotonic()
        if self._world.size == 1:
            return
        shown = self._place.samples if samples is None else tuple(samples[:_SHOWN])
        self._place = Place(
            host=self._place.host,
            process=self._place.process,
            marks=self._place.marks + 1,
            step=step,
            work=work,
            samples=shown,
        )
        self._write()

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"

    def _write(self) -> None:
        """Write where this rank is; a failing disk doesn't stop it."""
        path = self._file(self._world.rank)
        temporary = path.with_suffix(".new")
        with suppress(OSError):
            temporary.write_text(json.dumps(asdict(self._place)), encoding="utf-8")
            os.replace(temporary, path)

    def _run(self) -> None:
        """Show signs of life, and look at the others and the launcher."""
        looked = time.monotonic()
        while not self._left.wait(BEAT_SECONDS):
            self._show_life()
            if self._launcher is not None and os.getppid() != self._launcher:
                self._outlive_launcher()
            if time.monotonic() - looked >= min(10.0, self._seconds / 10):
                looked = time.monotonic()
                self._look()

    def _show_life(self) -> None:
        if self._guardian is None or self._guardian.stdin is None:
            return
        with suppress(OSError):
            os.utime(self._file(self._world.rank))
        with suppress(OSError):
            os.write(self._guardian.stdin.fileno(), b".")

    def _outlive_launcher(self) -> None:
        """Let the loop save and stop; end if it can't."""
        now = time.monotonic()
        if self._orphan_since is None:
            self._orphan_since = now
            logger.warning("the launcher is gone; stopping at the end of this step")
        if now - self._orphan_since > self._seconds:
            self._end("the launcher is gone, and the step did not end")

    def _look(self) -> None:
        now = time.monotonic()
        stuck = self._place.step is not None and now - self._got_on > self._seconds
        # If this rank waits in vain, one that was stopped meanwhile is the reason.
        patience = min(self._seconds, _ACCUSE_SECONDS) if stuck else self._seconds
        signs = self._last_signs(now)
        silent = [rank for rank, since in signs.items() if now - since > patience]
        if silent:
            self._end(self._described(silent, "has shown no sign of life"))
        if stuck:
            self._end_for_those_behind()

    def _end_for_those_behind(self) -> NoReturn:
        marks = {rank: place.marks for rank, place in self._places().items()}
        behind = [rank for rank, count in marks.items() if count == min(marks.values())]
        self._end(self._described(behind, f"has not got on for {self._seconds:g} s"))

    def _last_signs(self, now: float) -> dict[int, float]:
        """Return when the sign of life of each other rank was last seen to change.

        A rank whose file is gone has left in good order.
        """
        found = {}
        for rank in range(self._world.size):
            if rank == self._world.rank:
                continue
            try:
                # An open file is asked, since network file systems answer by name from memory.
                with self._file(rank).open("rb") as file:
                    sign = os.fstat(file.fileno()).st_mtime_ns
            except OSError:
                continue
            known, since = self._seen.get(rank, (0, now))
            found[rank] = since if sign == known else now
            self._seen[rank] = (sign, found[rank])
        return found

    def _accuse(self) -> None:
        """End if some ranks show no sign of life or kept the others waiting, and name them."""
        numbers = (signal.SIGTERM, signal.SIGINT)  # of a launcher that has seen the same
        before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
        self._left.set()
        self._thread.join()
        begin = time.monotonic()
        timed_out = begin - self._got_on > 0.9 * self._seconds
        self._last_signs(begin)
        while time.monotonic() - begin < _ACCUSE_SECONDS:
            time.sleep(BEAT_SECONDS / 4)
            self._show_life()
            signs = self._last_signs(time.monotonic())
        silent = [rank for rank, since in signs.items() if since <= begin]
        if silent:
            self._end(self._described(silent, "died or was stopped"))
        if timed_out and self._place.step is not None:
            self._end_for_those_behind()
        for number, handler in before.items():
            signal.signal(number, handler)

    def _places(self) -> dict[int, Place]:
        found = {}
        for rank in range(self._world.size):
            with suppress(InputError):
                path = self._file(rank)
                found[rank] = parse(Place, read_json(path), str(path))
        return found

    def _described(self, ranks: Sequence[int], what: str) -> str:
        places = self._places()
        return "; ".join(f"rank {rank} {what}: {places.get(rank, 'unknown')}" for rank in ranks)

    def _end(self, message: str) -> NoReturn:
        """End this process at once: its other threads may wait for a rank for ever."""
        sys.stderr.write(f"error: {message}. Run the same command to continue\n")
        sys.stderr.flush()
        os._exit(RankError.exit_code)
