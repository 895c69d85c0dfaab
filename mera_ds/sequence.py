"""Carrying out a plan: skip what is finished, share what another run has made, launch the rest."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mera_ds.checkpoint import check_lineage, is_finished, read_manifest
from mera_ds.config import REPOSITORY, RunConfig, load_config
from mera_ds.distributed import World, ensure_launcher_variables, process_group
from mera_ds.errors import InputError, Interrupted, MeraError
from mera_ds.files import TEMPORARY, committed_folder, folder_lock, link_or_copy, remove_temporaries
from mera_ds.identity import backbone_folder, base_sha256, product_key
from mera_ds.log import format_duration, logger
from mera_ds.manifest import Manifest, backbone_identity
from mera_ds.mergeconfig import CMA
from mera_ds.plan import EvaluateStep, FisherStep, MergeStep, Plan, Step, TrainStep, load_plan
from mera_ds.registry import load_plugins

EXIT_INTERRUPTED = Interrupted.exit_code


@dataclass(frozen=True)
class Run:
    """A run's folder, configuration and plan."""

    folder: Path
    config: RunConfig
    plan: Plan
    overrides: tuple[str, ...]
    """`execution.key=value`, applied to `config` already; launched steps are given them too."""


def open_run(folder: Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run's configuration and plan, and load its plugins."""
    config = load_config(folder, overrides)
    load_plugins(config, folder)
    plan = load_plan(folder / "plan.json")
    unknown = [step.modality for step in plan.steps if step.modality not in config.order]
    if unknown:
        raise InputError(
            f"{folder}: the plan learns {unknown[0]}, the configuration does not: 'mera-ds add' "
            "was stopped while it wrote them; run it again"
        )
    return Run(folder, config, plan, tuple(overrides))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's lock, having removed (and named) what a killed process left unfinished."""
    with folder_lock(folder):
        for path in remove_temporaries(folder):
            logger.info("%s was left unfinished by a process that was killed; removed", path)
        yield


def step_is_finished(run: Run, step: Step) -> bool:
    """Return whether a step's product exists, made from what the run has now.

    Raises:
        InputError: if it was made from something else.
    """
    if isinstance(step, EvaluateStep):
        from mera_ds.evaluate.run import evaluation_is_finished

        return evaluation_is_finished(run.folder, run.config, step)
    if not (run.folder / step.output / "manifest.json").exists():
        return False
    return is_finished(
        run.folder / step.output, product_key(run.config, run.folder, run.plan, step)
    )


def execute_step(run: Run, step: Step, world: World) -> None:
    """Carry out one step in this process (all ranks of a training step call it)."""
    # It refuses missing data, weights and products before the seconds of imports that follow.
    product_key(run.config, run.folder, run.plan, step)
    if isinstance(step, TrainStep):
        from mera_ds.train.stage import run_train_step

        run_train_step(run.folder, run.config, run.plan, step, world)
    elif isinstance(step, FisherStep):
        from mera_ds.train.importance import run_fisher_step

        run_fisher_step(run.folder, run.config, run.plan, step, world)
    elif isinstance(step, MergeStep):
        execute_merge(run, step)
    else:
        from mera_ds.evaluate.run import run_evaluate_step

        run_evaluate_step(run.folder, run.config, step, world)


def execute_merge(run: Run, step: MergeStep) -> None:
    """Write the merged model of a stage, unless it is finished."""
    from mera_ds.merge.lineage import merge_product, merge_product_by
    from mera_ds.merge.methods import open_method
    from mera_ds.train.penalty import load_importance

    key = product_key(run.config, run.folder, run.plan, step)
    if is_finished(run.folder / step.output, key):
        logger.info("%s is finished", step.name)
        shutil.rmtree(_merge_folder(run, step), ignore_errors=True)  # if a kill came in between
        return
    start, output = run.folder / step.start, run.folder / step.output
    check_lineage(start, read_manifest(start), base_sha256(run.config, run.folder))
    facts: dict[str, Any] = {"key": key, "step": step.name, "stage": step.stage}
    if read_manifest(start).backbone is not None:
        manifest = _merge_full(run, step, key)
    elif step.method == CMA:
        manifest = merge_product(start, output, coefficient=step.coefficient, **facts)
    else:
        method = open_method(step.method, step.options)
        if method.kind.warning is not None:
            logger.warning("%s: %s", step.name, method.kind.warning)
        importance = {run.plan.producer(name).stage: name for name in step.importance}
        measured = {at: load_importance(run.folder / name) for at, name in importance.items()}
        manifest = merge_product_by(method, start, output, measured=measured, **facts)
    weight = step.coefficient if manifest.backbone else manifest.lineage[-1].coefficient
    logger.info(
        "%s: merged by %s, newest %s weighted by %s, backbone %s",
        step.name,
        step.method,
        "backbone" if manifest.backbone else "delta",
        weight,
        manifest.backbone_sha256[:12],
    )


def _merge_folder(run: Run, step: MergeStep) -> Path:
    """Return where full weights are merged, before the product holds them."""
    return (run.folder / step.output).with_name(step.kind)


def _merge_full(run: Run, step: MergeStep, key: str) -> Manifest:
    """Average the backbone that was tuned as a whole with the one that it was tuned from."""
    from mera_ds.merge.full import FullMerge, merge_full_product
    from mera_ds.merge.safetensors_io import DTYPE_NAMES

    tune = run.plan.producer(step.start)
    before = None if tune.start is None else run.folder / tune.start
    base = base_sha256(run.config, run.folder)
    merge = FullMerge(
        tuned=run.folder / step.start,
        previous=backbone_folder(run.config, run.folder, before),
        previous_sha256=(
            backbone_identity(base, ()) if before is None else read_manifest(before).backbone_sha256
        ),
        dtype=DTYPE_NAMES[run.config.backbone.dtype],
    )
    backbone_folder(run.config, run.folder, merge.tuned)  # checks its files
    return merge_full_product(
        merge,
        run.folder / step.output,
        _merge_folder(run, step),
        key=key,
        step=step.name,
        stage=step.stage,
        coefficient=step.coefficient,
    )


def share_product(run: Run, step: Step, others: Sequence[Path]) -> bool:
    """Take over a product with the same key from another run, by hard links.

    Of an evaluation the predictions are taken; they are scored again.

    Returns:
        Whether the step is finished by it.
    """
    if isinstance(step, EvaluateStep):
        _share_predictions(run, step, others)
        return False
    if (run.folder / step.output).exists():
        return False
    key = product_key(run.config, run.folder, run.plan, step)
    products = (entry for other in others if other != run.folder for entry in _products(other))
    source = next((entry for entry in products if read_manifest(entry).key == key), None)
    if source is None:
        return False
    with committed_folder(run.folder / step.output) as folder:
        for path in sorted(entry for entry in source.rglob("*") if entry.is_file()):
            link_or_copy(path, folder / path.relative_to(source))
    logger.info("%s: the same as %s, taken from there", step.name, source)
    return True


def _share_predictions(run: Run, step: EvaluateStep, others: Sequence[Path]) -> None:
    """Take over what an equal model said about equal test items in another run."""
    from mera_ds.evaluate.run import predictions_folder

    own = predictions_folder(run.folder, run.config, step)
    for other in others:
        for source in sorted(other.glob(f"stages/*/evaluation/predictions/{own.name}/*.jsonl")):
            if other != run.folder and not (own / source.name).exists():
                link_or_copy(source, own / source.name)
                logger.info("%s: predictions taken from %s", step.name, source)


def _products(run: Path) -> list[Path]:
    folders = [manifest.parent for manifest in sorted(run.glob("stages/*/*/manifest.json"))]
    return [folder for folder in folders if TEMPORARY not in folder.name]


def run_plans(
    runs: Sequence[Run], until: str | None = None, share_with: Sequence[Path] = ()
) -> None:
    """Carry out the plans of some runs one after another, sharing equal products.

    Args:
        runs: the runs; a product that one has made is not made again by the others.
        until: stop behind the step of this name (or behind its stage, e.g. `02-video`).
        share_with: folders of further runs whose products are taken over where they are equal.

    Raises:
        MeraError: of the first step that fails; what is finished stays.
    """
    clock = _Clock(sum(cost(run, step) for run in runs for step in _wanted(run, until)))
    folders = list(dict.fromkeys([*(run.folder for run in runs), *share_with]))
    world = ensure_launcher_variables()
    # One process group for all steps in this process: DeepSpeed can't follow it into another.
    with process_group(world, max(run.config.execution.timeout_seconds for run in runs)):
        for run in runs:
            for step in _wanted(run, until):
                _carry_out(run, step, folders, world, clock)


def _wanted(run: Run, until: str | None) -> list[Step]:
    if until is None:
        return list(run.plan.steps)
    names = [step.name for step in run.plan.steps]
    places = [place for place, name in enumerate(names) if until in (name, name.partition("/")[0])]
    stages = [place for place, step in enumerate(run.plan.steps) if step.modality == until]
    if not places and not stages:
        raise InputError(f"--until {until} names no step; steps: {', '.join(names)}")
    return list(run.plan.steps[: max(places + stages) + 1])


def _carry_out(
    run: Run, step: Step, folders: Sequence[Path], world: World, clock: "_Clock"
) -> None:
    label = f"{run.folder.name} {step.name}"
    execution = run.config.execution
    alone = isinstance(step, EvaluateStep) and execution.processes == 1
    inline = isinstance(step, MergeStep) or execution.launcher == "inline" or alone
    with locked(run.folder):
        if step_is_finished(run, step):
            clock.skip(cost(run, step))
            logger.info("%s: finished before", label)
            return
        if share_product(run, step, folders):
            clock.skip(cost(run, step))
            return
        logger.info("── %s  (%s)", label, clock.line())
        if inline:
            execute_step(run, step, world)
    if not inline:
        _launch(run, step)
    clock.done(cost(run, step))


def _launch(run: Run, step: Step) -> None:
    """Start a step under torchrun or deepspeed and pass on how it ended.

    The step's first rank takes the run's lock, so that ranks keep it which outlive this process
    and their launcher (torchrun's do when both are killed).
    """
    if isinstance(step, EvaluateStep):
        script = "score.py"
    else:
        realigns = isinstance(step, TrainStep) and step.phase == "realign"
        script = "realign.py" if realigns else "stage.py"
    execution = run.config.execution
    command = [
        *_launcher_command(execution.launcher, execution.processes),
        str(REPOSITORY / "launch" / script),
        "--run-folder",  # torchrun would take --run for its own --run-path
        str(run.folder),
        "--modality",
        step.modality,
        "--step",
        step.name,
        *run.overrides,
    ]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    with subprocess.Popen(command, env=environment) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            _stop(process.pid, execution.launcher)
            process.wait()
            code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:
        raise Interrupted(f"{step.name} was stopped; run the same command to continue")
    if code != 0:
        raise MeraError(
            f"{step.name} ended with exit status {code}; see the lines above, then run the same "
            "command again to continue"
        )


def _stop(launcher: int, name: str) -> None:
    """Ask a launcher to stop its ranks, which save first."""
    process = psutil.Process(launcher)
    # The command deepspeed doesn't pass signals on; the process that it starts does.
    children = process.children() if name == "deepspeed" else []
    for receiver in children or [process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            receiver.terminate()


def _launcher_command(launcher: str, processes: int) -> list[str]:
    if launcher == "torchrun":
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
        ]
    return [sys.executable, "-m", "deepspeed.launcher.runner", f"--num_gpus={processes}"]


def cost(run: Run, step: Step) -> float:
    """Return a step's share of the work, in backbone passes over samples; sets the time left."""
    if isinstance(step, MergeStep):
        return 0.0
    if isinstance(step, EvaluateStep):
        return 300.0 * len(step.modalities)
    phase = "tune" if isinstance(step, FisherStep) else step.phase
    settings = run.config.phase(phase)
    samples = (settings.max_steps or 1000) * settings.batch_size
    share = sum(part.percent for part in step.data) / 100 if isinstance(step, FisherStep) else 1.0
    return (3.0 if phase == "tune" else 2.0) * samples * share


class _Clock:
    """Elapsed time, and time left as far as the steps done so far tell."""

    def __init__(self, total: float) -> None:
        self._left = total
        self._done = 0.0
        self._started = time.monotonic()

    def skip(self, share: float) -> None:
        self._left -= share

    def done(self, share: float) -> None:
        self._left -= share
        self._done += share

    def line(self) -> str:
        elapsed = time.monotonic() - self._started
        if self._done == 0:
            return "time left not known yet"
        left = elapsed / self._done * self._left
        return f"{format_duration(elapsed)} so far, about {format_duration(left)} left"
