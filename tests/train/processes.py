"""Real ranks for the tests, on the CPU: separate processes over gloo, started in milliseconds.

They are forked from a server that has imported torch and DeepSpeed already. So a test can start
many of them, and kill them as the system would.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import count as count_up
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_ports = count_up()

GRACE_SECONDS = 10.0
"""How long the other ranks live on when one has failed, as under torchrun."""


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    exit_code: int
    """Exit status; negative: the signal that killed it."""
    value: Any
    """What its function returned."""
    log: str
    """What it wrote to standard output and error."""


class Ranks:
    """Processes that run one function as the ranks of a group."""

    def __init__(
        self,
        function: Callable[..., Any],
        count: int,
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = TemporaryDirectory()
        port = str(_free_port())
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(count):
            variables = {
                "MERA_CACHE": os.environ["MERA_CACHE"],
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                **(environment or {}),
            }
            ours, theirs = server().Pipe(duplex=False)
            process = server().Process(
                target=_enter, args=(theirs, self._log(rank), variables, function, arguments)
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to every rank that lives, or to one."""
        for place, process in enumerate(self._processes):
            if process.is_alive() and rank in (None, place):
                with suppress(ProcessLookupError):  # it ends at this moment
                    os.kill(process.pid, number)

    @property
    def alive(self) -> bool:
        """Whether any rank lives."""
        return any(process.is_alive() for process in self._processes)

    def log(self, rank: int = 0) -> str:
        """Return what a rank has written so far."""
        path = self._log(rank)
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def wait(self, timeout: float = 120.0) -> list[Ended]:
        """Wait until all have ended; end the others when one has failed or the time is up."""
        values: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while self.alive:
            sentinels = [process.sentinel for process in self._processes if process.is_alive()]
            open_ends = [entry for entry in self._connections if not entry.closed]
            wait([*sentinels, *open_ends], max(0.0, min(1.0, deadline - time.monotonic())))
            self._receive(values)
            if any(process.exitcode not in (None, 0) for process in self._processes):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() >= deadline:
                self.signal(signal.SIGKILL)
        self._receive(values)
        ended = []
        for rank, process in enumerate(self._processes):
            process.join()
            ended.append(Ended(int(process.exitcode or 0), values.get(rank), self.log(rank)))
        self._folder.cleanup()
        return ended

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"{rank}.log"

    def _receive(self, values: dict[int, Any]) -> None:
        for rank, connection in enumerate(self._connections):
            if connection.closed or not connection.poll():
                continue
            try:
                values[rank] = connection.recv()
            except EOFError:
                connection.close()


def run_ranks(
    function: Callable[..., Any],
    count: int,
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    timeout: float = 120.0,
) -> list[Any]:
    """Run a function on some ranks and return their values; fail with the logs otherwise."""
    ended = Ranks(function, count, *arguments, environment=environment).wait(timeout)
    for rank, end in enumerate(ended):
        assert end.exit_code == 0, f"rank {rank} ended with {end.exit_code}:\n{end.log}"
    return [end.value for end in ended]


def train_command(
    run: Path,
    modality: str,
    *arguments: str,
    ranks: int = 1,
    environment: Mapping[str, str] | None = None,
    phases: tuple[str, ...] = ("align",),
) -> Ranks:
    """Start what `launch/stage.py` runs, without its seconds of imports."""
    words = ["--run-folder", str(run), "--modality", modality, *arguments]
    return Ranks(_train_stage, ranks, words, phases, environment=environment)


def _train_stage(arguments: list[str], phases: tuple[str, ...]) -> None:
    from mera_ds.cli.launch import train_stage

    sys.argv = ["stage.py", *arguments]
    sys.exit(train_stage(phases))


@cache
def server() -> ForkServerContext:
    """Return the context that forks; the first use starts the imports in the background."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.preloaded"])
    return context


def _enter(
    connection: Connection,
    log: Path,
    variables: Mapping[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(variables)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    connection.send(function(*arguments))


def _free_port() -> int:
    """Return a port that nobody listens at, below those that the system gives to connections."""
    for number in _ports:
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", 10000 + (101 * os.getpid() + number) % 9000))
            return int(listener.getsockname()[1])
    raise AssertionError
