"""The commands `mera-ds init | add | plan | run | status | report`."""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mera_ds.config import RunConfig, load_profile, resolve_path, save_config
from mera_ds.doctor import missing_paths
from mera_ds.errors import InputError, MeraError
from mera_ds.files import folder_lock, remove_temporaries, require_unlocked
from mera_ds.log import set_up_console
from mera_ds.methods import make_plan
from mera_ds.plan import (
    DataPart,
    EvaluateStep,
    FisherStep,
    MergeStep,
    Step,
    TrainStep,
    save_plan,
)
from mera_ds.registry import copy_plugins, find_plugins, keep_plugins

if TYPE_CHECKING:  # it needs torch
    from mera_ds.sequence import Run


def init(arguments: argparse.Namespace) -> None:
    """Make a run: resolved configuration, plan, and what the profile's recipe builds.

    Raises:
        InputError: if the folder is a run already, or a setting is wrong.
    """
    overrides = list(arguments.overrides)
    if arguments.method is not None:
        overrides.append(f"method={arguments.method}")
    folder: Path = arguments.run
    config = make_run(folder, arguments.profile, overrides)
    print(f"{folder}: {config.profile}, {config.method}, {' → '.join(config.order)}")
    print(f"next: mera-ds plan {folder}; mera-ds run {folder}")


def make_run(folder: Path, name: str, overrides: Sequence[str]) -> RunConfig:
    """Make a run from a profile, by name or path; return its configuration.

    Raises:
        InputError: if the folder is a run already, or a setting is wrong.
    """
    from mera_ds.merge.methods import open_method
    from mera_ds.modality import check_kinds

    if (folder / "config.yaml").exists():
        raise InputError(f"{folder} is a run already; choose another name or delete it")
    config = load_profile(name, overrides)
    profile = Path(name)
    base = profile.parent if profile.suffix in (".yaml", ".yml") else Path()
    plugins = find_plugins(config.plugins, base, folder)
    config = dataclasses.replace(config, plugins=keep_plugins(plugins, folder))
    plan = make_plan(config)
    check_kinds(config, config.modalities)
    open_method(config.merge.method, config.merge.options)
    with folder_lock(folder):
        remove_temporaries(folder)
        if config.build is not None:
            _build_inside(config, folder)
        copy_plugins(plugins, folder)
        save_plan(plan, folder / "plan.json")
        save_config(config, folder / "config.yaml")
    return config


def add(arguments: argparse.Namespace) -> None:
    """Add a modality to a run, as the last of its order."""
    from mera_ds.modality import add_modality

    set_up_console()
    folder: Path = arguments.run
    config = add_modality(folder, arguments.file)
    print(f"{folder}: {config.method} on {' → '.join(config.order)}")
    print(f"next: mera-ds plan {folder}; mera-ds run {folder}")


def _build_inside(config: RunConfig, folder: Path) -> None:
    from mera_ds import recipes
    from mera_ds.recipes.tiny_backbone import write_tiny_backbone

    assert config.build is not None
    recipes.build(config.build, None, folder / "data", lambda line: None)
    write_tiny_backbone(resolve_path(config.backbone.path, folder), config.seed)


def plan(arguments: argparse.Namespace) -> None:
    """Print every step, with the work that it is and an estimate of what it takes."""
    from mera_ds.cli.estimates import describe_estimates
    from mera_ds.sequence import open_run

    for folder in arguments.runs:
        run = open_run(folder)
        print(f"{folder}: {run.plan.method} on {' → '.join(run.config.order)}")
        estimates, below = describe_estimates(run)
        for number, (step, estimate) in enumerate(
            zip(run.plan.steps, estimates, strict=True), start=1
        ):
            print(f"  {number:2d}  {step.name:24s} {_describe(run, step)}")
            print(f"      {'':24s} {estimate}")
        for line in below:
            print(f"  {line}")
        if missing_paths(run.config, folder):
            print(f"  files are missing: run 'mera-ds doctor {folder}'")


def _describe(run: "Run", step: Step) -> str:
    start = "the bare backbone" if step.start is None else run.plan.producer(step.start).name
    if isinstance(step, MergeStep):
        newest = "tuned backbone" if run.config.tuning == "full" else "newest delta"
        what = f"weigh the {newest} by {step.coefficient}" if step.coefficient else step.method
        return f"{what}  from {start}"
    if isinstance(step, EvaluateStep):
        return f"generate and score on {', '.join(step.modalities)}  with {start}"
    if isinstance(step, FisherStep):
        return f"measure the Fisher information on {_shares(step.data)}  with {start}"
    return f"{_describe_training(run, step)}  from {start}"


def _shares(data: Sequence[DataPart]) -> str:
    return ", ".join(
        part.modality if part.percent == 100 else f"{part.percent:g} % of {part.modality}"
        for part in data
    )


def _describe_training(run: "Run", step: TrainStep) -> str:
    settings = run.config.phase(step.phase)
    sets = ", ".join(step.trainable)
    what = f"train {sets} on {'+'.join(settings.tasks)} of {_shares(step.data)}"
    if step.adapter != "new":
        what += f", adapter {step.adapter}"
    if step.penalty is not None:
        what += f", held by {step.penalty.strength:g} × importance"
    try:
        texts = sum(_texts(run, part, settings.tasks) for part in step.data)
    except InputError:  # the shards aren't there yet
        times = "once" if settings.epochs == 1 else f"{settings.epochs} times"
        return f"{what}: steps of {settings.batch_size}, through all {times}"
    steps = math.ceil(texts / settings.batch_size) * settings.epochs
    return (
        f"{what}: {min(steps, settings.max_steps or steps)} steps of {settings.batch_size} "
        f"({texts} texts)"
    )


def _texts(run: "Run", part: DataPart, tasks: Sequence[str]) -> int:
    """Return how many texts a share of a modality's training data has."""
    from mera_ds.data.replay import replay_count
    from mera_ds.identity import data_folders
    from mera_ds.shards.format import read_index

    counts = [
        read_index(folder / "train").usable_counts
        for folder in data_folders(run.config, run.folder, part.modality)
    ]
    found = [sum(count[task] for count in counts) for task in tasks]
    return sum(replay_count(number, part.percent) for number in found)


def run(arguments: argparse.Namespace) -> None:
    """Carry out the plans of some runs."""
    for folder in arguments.runs:
        require_unlocked(folder)
    from mera_ds.sequence import open_run, run_plans

    set_up_console()
    run_plans([open_run(folder, arguments.overrides) for folder in arguments.runs], arguments.until)


def status(arguments: argparse.Namespace) -> None:
    """Print which steps are finished."""
    from mera_ds.sequence import open_run, step_is_finished

    for folder in arguments.runs:
        run = open_run(folder)
        print(f"{folder}: {run.plan.method} on {' → '.join(run.config.order)}")
        for step in run.plan.steps:
            try:
                state = "done" if step_is_finished(run, step) else _partial(folder, step)
            except MeraError as error:
                state = "blocked" if _start_is_missing(folder, step) else f"stale: {error}"
            print(f"  {step.name:24s} {state}")


def _start_is_missing(folder: Path, step: Step) -> bool:
    return step.start is not None and not (folder / step.start / "manifest.json").exists()


def _partial(folder: Path, step: Step) -> str:
    if not isinstance(step, TrainStep):
        return "to do"
    checkpoints = sorted((folder / step.output).parent.glob(f"{step.phase}/step-*"))
    return f"interrupted, saved at {checkpoints[-1].name}" if checkpoints else "to do"


def report(arguments: argparse.Namespace) -> None:
    """Print the tables of some runs and write them, with figures, to a folder."""
    from mera_ds.report import write_report

    runs: Sequence[Path] = arguments.runs
    out = arguments.out or (runs[0] if len(runs) == 1 else runs[0].parent) / "report"
    written = write_report(runs, out)
    print(written.text)
    for name in written.files:
        print(f"{written.folder / name}")
