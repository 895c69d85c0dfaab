"""Runs with models that nobody trained, to be evaluated."""

from pathlib import Path

from mera_ds.checkpoint import write_product
from mera_ds.config import load_config
from mera_ds.distributed import ensure_launcher_variables, process_group
from mera_ds.evaluate.run import run_evaluate_step
from mera_ds.identity import base_sha256
from mera_ds.model.build import build_encoders, build_model
from mera_ds.plan import EvaluateStep, load_plan


def steps(run: Path) -> list[EvaluateStep]:
    """Return the evaluations of a run."""
    return [step for step in load_plan(run / "plan.json").steps if isinstance(step, EvaluateStep)]


def make_model(run: Path, step: EvaluateStep) -> None:
    """Write the product that a step evaluates, with fresh connectors."""
    config = load_config(run)
    encoders = build_encoders(config, run, step.modalities)
    model = build_model(config, run, None, step.modalities, encoders)
    connectors = {name: entry.state_dict() for name, entry in model.connectors.items()}
    write_product(
        run / step.start,
        key=f"model of stage {step.stage}",
        step=step.name,
        base_sha256=base_sha256(config, run),
        previous=None,
        connectors=connectors,
    )


def evaluate_on_ranks(run: Path, stage: int) -> None:
    """Evaluate one stage as one of the ranks that the environment names."""
    world = ensure_launcher_variables()
    with process_group(world, 60):
        run_evaluate_step(run, load_config(run), steps(run)[stage - 1], world)
