"""The commands `mera-ds init | plan | run | status | report`."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mera_ds.config import (
    RunConfig,
    load_profile,
    parse,
    require_known,
    resolve_path,
    save_config,
)
from mera_ds.errors import InputError, MeraError
from mera_ds.log import set_up_console
from mera_ds.methods import make_plan
from mera_ds.plan import DataPart, EvaluateStep, MergeStep, Step, TrainStep, save_plan

if TYPE_CHECKING:  # it needs torch
    from mera_ds.sequence import Run


def init(arguments: argparse.Namespace) -> None:
    """Make a run: resolved configuration, plan, and what the profile's recipe builds.

    Raises:
        InputError: if the folder is a run already, or a setting is wrong.
    """
    folder: Path = arguments.run
    if (folder / "config.yaml").exists():
        raise InputError(f"{folder} is a run already; choose another name or delete it")
    overrides = list(arguments.overrides)
    if arguments.method is not None:
        overrides.append(f"method={arguments.method}")
    config = load_profile(arguments.profile, overrides)
    plan = make_plan(config)
    _check_components(config)
    if config.build is not None:
        _build_inside(config, folder)
    save_plan(plan, folder / "plan.json")
    save_config(config, folder / "config.yaml")
    print(f"{folder}: {config.profile}, {plan.method}, {' → '.join(config.order)}")
    print(f"next: mera-ds plan {folder}; mera-ds run {folder}")


def _check_components(config: RunConfig) -> None:
    """Refuse an unknown encoder, connector, merge method or option now, not when it is needed."""
    from mera_ds.merge.methods import open_method
    from mera_ds.model.connectors import CONNECTORS
    from mera_ds.model.encoders import ENCODERS

    open_method(config.merge.method, config.merge.options)
    for name, modality in config.modalities.items():
        encoder, connector = modality.encoder, modality.connector
        where = f"modalities.{name}"
        require_known(encoder.kind, ENCODERS, f"{where}.encoder: kind")
        parse(ENCODERS[encoder.kind].Options, encoder.options, f"{where}.encoder.options")
        require_known(connector.kind, CONNECTORS, f"{where}.connector: kind")
        parse(CONNECTORS[connector.kind].Options, connector.options, f"{where}.connector.options")


def _build_inside(config: RunConfig, folder: Path) -> None:
    from mera_ds import recipes
    from mera_ds.recipes.tiny_backbone import write_tiny_backbone

    assert config.build is not None
    recipes.build(config.build, None, folder / "data", lambda line: None)
    write_tiny_backbone(resolve_path(config.backbone.path, folder), config.seed)


def plan(arguments: argparse.Namespace) -> None:
    """Print every step, with the work that it is."""
    from mera_ds.sequence import open_run

    for folder in arguments.runs:
        run = open_run(folder)
        print(f"{folder}: {run.plan.method} on {' → '.join(run.config.order)}")
        for number, step in enumerate(run.plan.steps, start=1):
            print(f"  {number:2d}  {step.name:24s} {_describe(run, step)}")


def _describe(run: "Run", step: Step) -> str:
    start = "the bare backbone" if step.start is None else run.plan.producer(step.start).name
    if isinstance(step, MergeStep):
        what = f"weigh the newest delta by {step.coefficient}" if step.coefficient else step.method
        return f"{what}  from {start}"
    if isinstance(step, EvaluateStep):
        return f"generate and score on {', '.join(step.modalities)}  with {start}"
    return f"{_describe_training(run, step)}  from {start}"


def _describe_training(run: "Run", step: TrainStep) -> str:
    settings = run.config.phase(step.phase)
    shares = ", ".join(
        part.modality if part.percent == 100 else f"{part.percent:g} % of {part.modality}"
        for part in step.data
    )
    texts = sum(_texts(run, part, settings.tasks) for part in step.data)
    steps = math.ceil(texts / settings.batch_size) * settings.epochs
    return (
        f"train {', '.join(step.trainable)} on {'+'.join(settings.tasks)} of {shares}: "
        f"{min(steps, settings.max_steps or steps)} steps of {settings.batch_size} "
        f"({texts} texts)"
    )


def _texts(run: "Run", part: DataPart, tasks: Sequence[str]) -> int:
    """Return how many texts a share of a modality's training data has."""
    from mera_ds.identity import data_folders
    from mera_ds.shards.format import read_index

    counts = [
        read_index(folder / "train").counts
        for folder in data_folders(run.config, run.folder, part.modality)
    ]
    found = [sum(count[task] for count in counts) for task in tasks]
    return sum(math.ceil(number * part.percent / 100) for number in found)


def run(arguments: argparse.Namespace) -> None:
    """Carry out the plans of some runs."""
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
    figures = [path for path in (written.gains, written.scores) if path is not None]
    print(f"report:  {written.markdown}\ntables:  {written.csv}")
    print(f"figures: {', '.join(map(str, figures))}")
