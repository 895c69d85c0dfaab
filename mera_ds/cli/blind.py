"""The command `mera-ds without-media`: what the bare backbone scores from the questions alone."""

import argparse
import contextlib
from pathlib import Path

from mera_ds.cli.launch import DEFAULT_RUN
from mera_ds.evaluate.predictions import WITHOUT_MEDIA
from mera_ds.files import folder_lock
from mera_ds.log import set_up_console


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `mera-ds`."""
    parser = commands.add_parser(
        "without-media",
        help="score the bare backbone on a run's tests without media: the floor",
        epilog="execution.KEY=VALUE anywhere overrides how it is executed.",
    )
    parser.add_argument("run", type=Path, nargs="?", default=Path(DEFAULT_RUN))
    parser.set_defaults(command=without_media, overrides=())


def without_media(arguments: argparse.Namespace) -> None:
    """Generate, score, print a line per test and write the run's file of them.

    Raises:
        InputError: if the run, its backbone or a test's shards are missing.
    """
    from mera_ds.distributed import ensure_launcher_variables, process_group
    from mera_ds.evaluate.blind import score_without_media
    from mera_ds.sequence import open_run

    world = ensure_launcher_variables()
    set_up_console(world.rank)
    run = open_run(arguments.run, arguments.overrides)
    # Ranks on all nodes see the folder; one of them holds it.
    lock = folder_lock(run.folder) if world.is_main else contextlib.nullcontext()
    with lock, process_group(world, run.config.execution.timeout_seconds):
        score_without_media(run.folder, run.config, world)
    if world.is_main:
        print(f"scores: {run.folder / WITHOUT_MEDIA}; `mera-ds report` shows them beside the runs'")
