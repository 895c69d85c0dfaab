"""The command `mera-ds diagnose`."""

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from mera_ds.errors import InputError
from mera_ds.evaluate.findings import StageModel
from mera_ds.files import folder_lock, remove_temporaries, write_bytes, write_json
from mera_ds.log import set_up_console
from mera_ds.plan import DataPart, TrainStep, connector_set, stage_folder
from mera_ds.report.results import EXPERT

if TYPE_CHECKING:  # they need torch
    from mera_ds.distributed import World
    from mera_ds.sequence import Run


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `mera-ds`."""
    parser = commands.add_parser(
        "diagnose", help="forgetting or misalignment: where old modalities lose"
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--samples", type=int, default=64, help="test texts per modality")
    parser.add_argument(
        "--realign",
        action="store_true",
        help="realign a copy of each stage's connectors first, for a method that does not",
    )
    parser.add_argument(
        "--scores",
        action="store_true",
        help="compare scores, as the paper does, instead of losses; generates where needed",
    )
    parser.add_argument("--out", type=Path, help="folder for the files; default <run>/report")
    parser.set_defaults(command=diagnose)


def diagnose(arguments: argparse.Namespace) -> None:
    """Print a table of a run's losses and drifts; write it as JSON, with a picture.

    Raises:
        InputError: if no stage of the run is finished, or it is one of experts; with `--scores`
            also if a modality scored nothing when it was learnt.
    """
    if arguments.samples < 1:
        raise InputError(f"--samples is {arguments.samples}; it must be at least 1")
    from mera_ds.distributed import ensure_launcher_variables, process_group
    from mera_ds.evaluate.diagnose import diagnose as find
    from mera_ds.report.diagnosis import LOSSES, SCORES, diagnosis_figure, diagnosis_table
    from mera_ds.report.render import to_text
    from mera_ds.sequence import open_run

    set_up_console()
    run = open_run(arguments.run)
    world = ensure_launcher_variables()
    with process_group(world, run.config.execution.timeout_seconds):
        stages = _finished(run, arguments.realign, world)
        with folder_lock(run.folder) if arguments.scores else contextlib.nullcontext():
            findings = find(
                run.folder, run.config, stages, arguments.samples, world, arguments.scores
            )
    title = f"Forgetting or misalignment: {run.folder.resolve().name} ({run.plan.method})"
    out = arguments.out or run.folder / "report"
    rows = [
        dataclasses.asdict(entry)
        | {"misalignment": entry.misalignment, "forgetting": entry.forgetting}
        for entry in findings
    ]
    scale = SCORES if arguments.scores else LOSSES
    facts = {"schema": 1, "method": run.plan.method, "samples": arguments.samples}
    path = out / f"{scale.file}.json"
    write_json(path, facts | {"measure": scale.axis, "findings": rows})
    print(to_text(diagnosis_table(findings, title, scale)))
    print(f"findings: {path}")
    if len(stages) > 1:
        write_bytes(path.with_suffix(".png"), diagnosis_figure(findings, title, scale))
        print(f"figure:   {path.with_suffix('.png')}")


def _finished(run: "Run", realign: bool, world: "World") -> list[StageModel]:
    if run.config.method == EXPERT:
        raise InputError(f"{run.folder}: experts learn each modality alone and forget nothing")
    stages: list[StageModel] = []
    for number, modality in enumerate(run.config.order, start=1):
        product = run.folder / run.plan.final_model(modality)
        if not (product / "manifest.json").exists():
            break
        realigned = _realigned(run, number, world) if realign and number > 1 else product
        stages.append(StageModel(modality, product, realigned))
    if not stages:
        raise InputError(f"{run.folder} has no finished stage yet; run 'mera-ds run' first")
    return stages


def _realigned(run: "Run", stage: int, world: "World") -> Path:
    """Realign a copy of a stage's connectors, as MERA would, once; or take what its method did."""
    from mera_ds.sequence import execute_step

    modality, seen = run.config.order[stage - 1], run.config.order[:stage]
    steps = run.plan.of_stage(modality)
    if any(isinstance(step, TrainStep) and step.phase == "realign" for step in steps):
        return run.folder / run.plan.final_model(modality)
    step = TrainStep(
        name=f"{stage:02d}-{modality}/diagnose",
        stage=stage,
        modality=modality,
        phase="realign",
        start=run.plan.final_model(modality),
        trainable=tuple(connector_set(name) for name in seen),
        data=tuple(DataPart(modality=n, percent=run.config.replay.realigning) for n in seen),
        output=f"{stage_folder(stage, modality)}/diagnosed",
    )
    with folder_lock(run.folder):
        remove_temporaries(run.folder)
        execute_step(run, step, world)
    return run.folder / step.output
