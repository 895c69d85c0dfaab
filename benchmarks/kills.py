"""Kills the commands with SIGKILL at random moments, again and again, and runs them to their end.

python benchmarks/kills.py                 200 kills; writes results/kills.md
python benchmarks/kills.py --kills 12      a short one

Every command of a small run (profile `tiny`, CPU, one rank) first runs undisturbed. Then it is
started from the same state and killed at a random moment of that time, until it gets to its end.
After every kill, all that has a final name must be readable; after every end, nothing unfinished
may be left and every byte must be as in the undisturbed run. The processes are real; they are
forked from this one, which has imported everything, so that a kill hits work and not an import.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
from kills_checks import differences, leftovers, listing, repeated_steps, unreadable
from kills_table import markdown
from safetensors.numpy import load_file, save_file

import mera_ds.cli
import mera_ds.evaluate.run
import mera_ds.merge.lineage
import mera_ds.merge.state_dicts
import mera_ds.recipes.tiny
import mera_ds.train.stage
from mera_ds.cli import launch
from mera_ds.train.setup import prepare_environment

PATIENCE_SECONDS = 300.0
"""A command that takes longer hangs."""
SAVE_EVERY = 2
SETTINGS = (
    "order=[image,video]",
    "align.max_steps=6",
    "tune.max_steps=4",
    "realign.max_steps=4",
    "align.batch_size=8",
    "tune.batch_size=8",
    "realign.batch_size=8",
    "evaluate.max_new_tokens=4",
    "evaluate.limit=8",
    f"execution.save_every={SAVE_EVERY}",
)


@dataclass(frozen=True)
class Command:
    """A command that is killed."""

    name: str
    words: tuple[str, ...]
    """Program and arguments; `{}` stands for the work folder."""
    until: str = ""
    """Glob of what appears when the part that is killed is over; empty: the whole command."""
    product: str = ""
    """What it makes in one step and refuses to replace: once it is there, the command is done."""

    @property
    def is_part(self) -> bool:
        """Whether only a part of the command is killed."""
        return bool(self.until)


_STAGE = ("stage", "--run", "{}/run", "--modality", "image", "--step")
COMMANDS = (
    Command("shards build", ("mera-ds", "shards", "build", "tiny", "--out", "{}/shards")),
    Command(
        "init",
        ("mera-ds", "init", "{}/run", "--profile", "tiny", *SETTINGS),
        product="run/config.yaml",
    ),
    Command("features", (*_STAGE, "01-image/align"), until="cache/features/*/00000"),
    Command("align", (*_STAGE, "01-image/align")),
    Command("tune", (*_STAGE, "01-image/tune")),
    Command("merge", ("merge", "--run", "{}/run", "--modality", "video")),
    Command("realign", ("realign", "--run", "{}/run", "--modality", "video")),
    Command("evaluate", ("score", "--run", "{}/run", "--modality", "video")),
    Command(
        "merge of folders",
        (
            *("merge", "--previous", "{}/run/backbone", "--tuned", "{}/tuned", "--stage", "2"),
            *("--shard-size", "200KB", "--workers", "1", "--out", "{}/merged"),
        ),
        product="merged",
    ),
)
PROGRAMS: dict[str, Callable[[], int]] = {
    "mera-ds": mera_ds.cli.main,
    "stage": lambda: launch.train_stage(("align", "tune")),
    "realign": lambda: launch.train_stage(("realign",)),
    "merge": launch.merge,
    "score": launch.score,
}


@dataclass
class Tally:
    """What became of one command."""

    name: str
    seconds: float
    """Length of the undisturbed run, or of the part of it that is killed."""
    kills: int = 0
    with_work: int = 0
    """Kills after which something had been written since the start of the killed process."""
    ends: int = 0
    problems: list[str] = field(default_factory=list)


class Workplace:
    """Where one command works: a folder that is put back to its start again and again."""

    def __init__(self, command: Command, folder: Path, start: Path) -> None:
        self.folder = folder
        self.command = command
        self._start = start
        self._log = folder.with_suffix(".log")

    def reset(self) -> None:
        """Put everything back to the start."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._start, self.folder)

    def run(self, seconds: float | None = None) -> int | None:
        """Start the command; return its exit status, or None if it was killed after `seconds`.

        Raises:
            TimeoutError: it hangs.
        """
        process = self._fork()
        started = time.monotonic()
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            spent = time.monotonic() - started
            if seconds is not None and spent >= seconds:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                return None
            if spent > PATIENCE_SECONDS:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                raise TimeoutError(f"{self.command.name} hangs:\n{self.log()}")
            time.sleep(0.0005)

    def run_undisturbed(self) -> float:
        """Run the command to its end; return how long the part took that is to be killed."""
        process = self._fork()
        started = time.monotonic()
        over = 0.0
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            seen = self.command.is_part and any(self.folder.glob(self.command.until))
            if not over and (ended or seen):
                over = time.monotonic() - started
            if ended:
                code = os.waitstatus_to_exitcode(status)
                assert code == 0, f"{self.command.name} ended with {code}:\n{self.log()}"
                return over
            time.sleep(0.0005)

    @property
    def is_done(self) -> bool:
        """Whether the command has made what it would refuse to make again."""
        product = self.command.product
        return bool(product) and (self.folder / product).exists()

    def log(self) -> str:
        """Return what the last process printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-4000:]

    def _fork(self) -> int:
        sys.stdout.flush()
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            os.setsid()
            opened = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, 1)
            os.dup2(opened, 2)
            os.environ["MERA_CACHE"] = str(self.folder / "cache")
            sys.argv = [word.replace("{}", str(self.folder)) for word in self.command.words]
            code = PROGRAMS[sys.argv[0]]()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:  # noqa: BLE001 - a forked process must never return to the loop
            traceback.print_exc()
        finally:
            os._exit(code)


def torment(place: "Workplace", kills: int, draw: random.Random) -> Tally:
    """Kill a command so many times; return what became of it. Its end state stays in the folder."""
    if not kills and place.command.is_part:
        return Tally(place.command.name, 0.0)
    tally = Tally(place.command.name, place.run_undisturbed())
    if not kills:
        return tally
    expected = listing(place.folder)
    started_again = 0
    place.reset()
    repeated = repeated_steps(place.folder)
    while True:
        before = _state(place.folder)
        last = tally.kills >= kills
        code = place.run(None if last else draw.uniform(0.0, tally.seconds))
        if code is None:
            tally.kills += 1
            started_again += 1
            tally.with_work += _state(place.folder) != before
            tally.problems += unreadable(place.folder)
            if not place.is_done:
                continue
            last = tally.kills >= kills
        tally.ends += 1
        if code:
            tally.problems.append(f"{tally.name} ended with {code}:\n{place.log()}")
        tally.problems += leftovers(place.folder)
        tally.problems += differences(expected, listing(place.folder))
        if repeated_steps(place.folder) > repeated + started_again * SAVE_EVERY:
            tally.problems.append(f"{tally.name} repeated more steps than lie between two saves")
        if last:
            return tally
        started_again = 0
        place.reset()


def _state(folder: Path) -> list[tuple[str, int, int]]:
    """Return path, size and time of change of every file."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name != ".lock"]
    states = [(str(path), path.stat()) for path in paths]
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states]


def torment_all(work: Path, kills: int, draw: random.Random) -> list[Tally]:
    """Torment the commands one after another; each starts from what the one before has made."""
    folder = work / "place"
    folder.mkdir(parents=True)
    tallies = []
    for number, command in enumerate(COMMANDS):
        BETWEEN.get(command.name, lambda folder: None)(folder)
        start = Path(shutil.copytree(folder, work / "start"))
        place = Workplace(command, folder, start)
        tallies.append(torment(place, (kills + number) // len(COMMANDS), draw))
        if command.is_part:
            place.reset()
        shutil.rmtree(start)
        print(tallies[-1], flush=True)
    return tallies


def _finish_up_to_the_merge(folder: Path) -> None:
    until = Command("", ("mera-ds", "run", "{}/run", "--until", "02-video/tune"))
    place = Workplace(until, folder, folder)
    code = place.run()
    assert code == 0, place.log()


def _add_second_model(folder: Path) -> None:
    """Copy the backbone with other weights."""
    shutil.copytree(folder / "run/backbone", folder / "tuned")
    for path in (folder / "tuned").glob("*.safetensors"):
        tensors = {name: entry + np.float32(0.01) for name, entry in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})


BETWEEN: dict[str, Callable[[Path], None]] = {
    "merge": _finish_up_to_the_merge,
    "merge of folders": _add_second_model,
}
"""What is done before a command, beside the commands themselves."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill all commands, write the table, and return 1 if anything went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="of all commands together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("build/kills"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    prepare_environment()
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    load, started = os.getloadavg()[0], time.monotonic()
    tallies = torment_all(work, options.kills, random.Random(options.seed))
    text = markdown(tallies, time.monotonic() - started, options.seed, load)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "kills.md").write_text(text, encoding="utf-8")
    print(text)
    shutil.rmtree(work)
    return int(any(tally.problems for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
