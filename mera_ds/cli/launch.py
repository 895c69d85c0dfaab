"""The commands behind `launch/*.py`: parse, call, exit status."""

import argparse
import contextlib
import dataclasses
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mera_ds.cli.merging import add_merge_arguments, merge_folders
from mera_ds.errors import InputError, Interrupted, MeraError
from mera_ds.files import require_unlocked
from mera_ds.mergeconfig import CMA

if TYPE_CHECKING:  # `mera-ds --help` needs no torch, and a merge of two folders not even a plan
    from mera_ds.plan import EvaluateStep, Step
    from mera_ds.sequence import Run

DEFAULT_RUN = "runs/default"
OVERRIDE = re.compile(r"[a-z_]+(\.[\w-]+)*=")
"""How an argument that changes a setting begins; a folder that does can be written `./a=b`."""


_WRONG_PLACE = (
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)
"""What the system says where a path that was given can't be read, or can't hold what it should."""


def guarded(command: Callable[[], None]) -> int:
    """Run a command; print a `MeraError` as one message and return its exit status.

    A path that can't be used is bad input as well, whatever was to be done with it.
    """
    try:
        with _sigterm_as_interrupt():
            command()
    except MeraError as error:
        # All ranks meet bad input and a request to stop; once is enough.
        common = isinstance(error, InputError | Interrupted)
        if os.environ.get("RANK", "0") == "0" or not common:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in _WRONG_PLACE or error.filename is None:
            raise
        print(
            f"error: {error.filename} can't be used: {error.strerror}; give another path, or see "
            "that this one may be used and no file stands where a folder is meant",
            file=sys.stderr,
        )
        return InputError.exit_code
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("error: stopped; run the same command to continue", file=sys.stderr)
        return Interrupted.exit_code
    return 0


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, and do again afterwards what it did before.

    A handler left behind would be inherited by every process that the caller forks later. Python
    forgets a signal that such a process gets before its first instruction, and so it would live on.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def leave(status: int) -> NoReturn:
    """End this process with an exit status, without taking the interpreter apart.

    What DeepSpeed remembers of a process group outlives the group, and with it gloo's threads;
    they now and then abort a process that takes itself apart below them.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    os._exit(status)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        epilog="execution.KEY=VALUE anywhere overrides how the run is executed.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--run", "--run-folder", type=Path, default=Path(DEFAULT_RUN), help="the run's folder"
    )
    parser.add_argument("--modality", help="which stage of the run")
    parser.add_argument("--profile", help="refuse to work on a run of another profile")
    parser.set_defaults(overrides=())
    return parser


def _add_launched_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `mera-ds run` and the launchers say to a script."""
    parser.add_argument("--step", help="only this step of the plan")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def parse_with_overrides(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse arguments, collecting `section.key=value` from anywhere among them."""
    words = sys.argv[1:] if arguments is None else arguments
    overrides = [word for word in words if OVERRIDE.match(word)]
    parsed = parser.parse_args([word for word in words if not OVERRIDE.match(word)])
    if overrides and not hasattr(parsed, "overrides"):
        parser.error(f"this command changes no settings: {' '.join(overrides)}")
    parsed.overrides = overrides
    return parsed


def _open(arguments: argparse.Namespace) -> "Run":
    from mera_ds.sequence import open_run

    run = open_run(arguments.run, arguments.overrides)
    if arguments.profile is not None:
        from mera_ds.config import load_profile

        wanted = load_profile(arguments.profile).profile
        if wanted != run.config.profile:
            raise InputError(
                f"{arguments.run} was made with the profile '{run.config.profile}', not "
                f"'{wanted}'; leave out --profile, or make another run with 'mera-ds init'"
            )
    return run


def _stage_of(run: "Run", modality: str | None) -> str:
    if modality is None:
        raise InputError(f"--modality is missing; this run learns {', '.join(run.config.order)}")
    if modality not in run.config.order:
        raise InputError(
            f"--modality {modality}: this run learns {' → '.join(run.config.order)}; name one of "
            "them, or make a run with another order"
        )
    return modality


def _refuse_busy(run: Path) -> None:
    if os.environ.get("RANK", "0") == "0":
        require_unlocked(run)


@contextlib.contextmanager
def _locked(run: "Run") -> Iterator[None]:
    """Hold the run's lock on the first process of the first node."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    from mera_ds.sequence import locked

    with locked(run.folder):
        yield


def train_stage(phases: Sequence[str]) -> int:
    """Run the training steps of one stage (`launch/stage.py`, `launch/realign.py`)."""
    parser = _parser(f"Train: {', '.join(phases)}.")
    _add_launched_arguments(parser)
    arguments = parse_with_overrides(parser)

    def command() -> None:
        _refuse_busy(arguments.run)
        from mera_ds.distributed import ensure_launcher_variables, process_group
        from mera_ds.log import set_up_console
        from mera_ds.sequence import execute_step

        world = ensure_launcher_variables()
        set_up_console(world.rank)
        run = _open(arguments)
        steps = [
            step
            for step in run.plan.of_stage(_stage_of(run, arguments.modality))
            if _belongs(step, phases) and arguments.step in (None, step.name)
        ]
        if not steps:
            raise InputError(
                f"the method '{run.plan.method}' has no step {' or '.join(phases)} in the stage of "
                f"{arguments.modality}"
            )
        with _locked(run), process_group(world, run.config.execution.timeout_seconds):
            for step in steps:
                execute_step(run, step, world)

    return guarded(command)


def _belongs(step: "Step", phases: Sequence[str]) -> bool:
    """Return whether a step is carried out by the script for these phases."""
    from mera_ds.plan import FisherStep, TrainStep

    if isinstance(step, FisherStep):  # tune or merge needs it
        return "tune" in phases
    return isinstance(step, TrainStep) and step.phase in phases


def merge() -> int:
    """Merge in a run, or any two HF checkpoints (`launch/merge.py`)."""
    parser = _parser("Merge a tuned backbone with the previous one.")
    add_merge_arguments(parser)
    arguments = parse_with_overrides(parser)

    def command() -> None:
        from mera_ds.log import set_up_console

        set_up_console()
        free = [arguments.previous, arguments.tuned, arguments.stage, arguments.out]
        if any(entry is not None for entry in free):
            merge_folders(arguments)
        elif arguments.method != CMA or arguments.base is not None:
            raise InputError(
                "--method and --base are for two folders, --previous and --tuned; in a run "
                "merge.method says how, or 'mera-ds lineage reweight RUN --method …' afterwards"
            )
        else:
            _merge_in_run(arguments)

    return guarded(command)


def _merge_in_run(arguments: argparse.Namespace) -> None:
    _refuse_busy(arguments.run)
    from mera_ds.plan import MergeStep
    from mera_ds.sequence import execute_merge

    run = _open(arguments)
    modality = _stage_of(run, arguments.modality)
    steps = [step for step in run.plan.of_stage(modality) if isinstance(step, MergeStep)]
    if not steps:
        print(f"nothing to merge: '{run.plan.method}' has no merge in the stage of {modality}")
        return
    with _locked(run):
        execute_merge(run, steps[0])


def score() -> int:
    """Evaluate a stage's model (`launch/score.py`)."""
    parser = _parser("Generate and score on the test sets.")
    parser.add_argument("--model", help="another model of the stage, e.g. a re-weighted one")
    _add_launched_arguments(parser)
    arguments = parse_with_overrides(parser)

    def command() -> None:
        _refuse_busy(arguments.run)
        from mera_ds.distributed import ensure_launcher_variables, process_group
        from mera_ds.log import set_up_console
        from mera_ds.plan import EvaluateStep
        from mera_ds.sequence import execute_step

        world = ensure_launcher_variables()
        set_up_console(world.rank)
        run = _open(arguments)
        steps = [step for step in run.plan.steps if isinstance(step, EvaluateStep)]
        if arguments.modality is not None:
            modality = _stage_of(run, arguments.modality)
            steps = [step for step in steps if step.modality == modality]
            steps = [step for step in steps if arguments.step in (None, step.name)]
            if not steps:
                raise InputError(f"the stage of {modality} has no evaluation {arguments.step}")
        else:
            done = [s for s in steps if (run.folder / s.start / "manifest.json").exists()]
            if not done:
                raise InputError(f"{run.folder} has no finished stage yet; run 'mera-ds run' first")
            steps = done[-1:]
        if arguments.model is not None:
            steps = [_of_model(run, step, arguments.model) for step in steps]
        with _locked(run), process_group(world, run.config.execution.timeout_seconds):
            for step in steps:
                execute_step(run, step, world)

    return guarded(command)


def _of_model(run: "Run", step: "EvaluateStep", model: str) -> "EvaluateStep":
    """Return the step for another model of its stage; its scores are kept apart."""
    start = Path(step.start).with_name(model)
    if not (run.folder / start / "manifest.json").exists():
        raise InputError(f"--model {model}: {run.folder / start} holds no finished model")
    name, output = f"{step.name}-{model}", f"{step.output}-{model}"
    return dataclasses.replace(step, name=name, start=str(start), output=output)
