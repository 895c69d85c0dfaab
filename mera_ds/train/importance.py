"""Measuring the importance of LoRA factors for EWC: the diagonal of the Fisher information.

    F = E_x [ (∂L(θ, x)/∂θ)² ]          (paper, appendix D; x one sample, L its mean loss per token)

One sample at a time goes forward and backward through the finished model of a stage; the ranks
share the samples. A pass is short (1 % of the samples, once), so one that is stopped starts anew.
"""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor, nn

from mera_ds.batch import Batch, Sample
from mera_ds.checkpoint import is_finished, write_product
from mera_ds.config import RunConfig
from mera_ds.distributed import World, main_rank_first, process_group, together
from mera_ds.errors import NumericError
from mera_ds.identity import base_sha256, product_key
from mera_ds.log import Metrics, logger
from mera_ds.model.build import build_encoders, build_model, memory_gb, move_to
from mera_ds.model.mllm import MultimodalLM
from mera_ds.model.trainable import set_trainable
from mera_ds.plan import LORA, FisherStep, Plan
from mera_ds.train.mixture import open_mixture
from mera_ds.train.penalty import accumulate, load_importance

LARGEST_SCALE = 2.0**16
"""Of the loss in fp16, whose gradients would vanish; it is halved where one is too large."""


def run_fisher_step(
    run: Path, config: RunConfig, plan: Plan, step: FisherStep, world: World
) -> None:
    """Measure a finished stage's importances and write them; do nothing if that is done.

    Args:
        run: the run's folder.
        config: the run's configuration.
        plan: the run's plan.
        step: which step.
        world: this process among the ranks that share the samples.

    Raises:
        InputError: if an input is missing, or was changed since the product was made.
    """
    with process_group(world, config.execution.timeout_seconds):
        key = product_key(config, run, plan, step)
        if is_finished(run / step.output, key):
            logger.info("%s is finished", step.name)
            return
        started = time.monotonic()
        found, count = _measure(run, config, step, world)
        figures = {"samples": count, "seconds": time.monotonic() - started}
        with Metrics(run, world.is_main) as metrics:
            metrics.write(step.name, step.stage, {**figures, "memory_gb": memory_gb()})
        if step.previous is not None:
            found = accumulate(load_importance(run / step.previous), found, step.decay)
        with main_rank_first(world) as mine:
            if mine:
                write_product(
                    run / step.output,
                    key=key,
                    step=step.name,
                    base_sha256=base_sha256(config, run),
                    previous=None,
                    importance=found,
                    provenance={"profile": config.profile, "seed": config.seed, "samples": count},
                )
                logger.info("%s: importance measured on %d samples", step.name, count)


def _measure(
    run: Path, config: RunConfig, step: FisherStep, world: World
) -> tuple[dict[str, Tensor], int]:
    modalities = [part.modality for part in step.data]
    encoders = build_encoders(config, run, modalities)
    mixture, _ = open_mixture(run, config, step.data, "tune", encoders, world)
    start = run / step.start
    model = build_model(config, run, start, modalities, encoders, step.modality, "carried")
    move_to(model, encoders, world.device)
    model.eval()
    parameters = set_trainable(model, [LORA])[LORA]
    units = [(part.reader, unit) for part in mixture.values() for unit in part.units]
    samples = (reader.read(unit) for reader, unit in units[world.rank :: world.size])
    scale = LARGEST_SCALE if config.backbone.dtype == "fp16" else 1.0
    with together():  # a damaged sample is one rank's
        squares = squared_gradients(model, parameters, samples, scale)
    if world.size > 1:
        for name in sorted(squares):
            torch.distributed.all_reduce(squares[name])
    return {name: (entry / len(units)).cpu() for name, entry in squares.items()}, len(units)


def squared_gradients(
    model: MultimodalLM,
    parameters: Mapping[str, nn.Parameter],
    samples: Iterable[Sample],
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Return the sum over samples of the squared gradient of each one's mean loss per token.

    Args:
        model: its losses are taken.
        parameters: with respect to what.
        samples: read one by one.
        scale: factor of the loss on the way back, taken out again; halved where one overflows.

    Raises:
        NumericError: if a sample's gradient is not finite whatever the scale.
    """
    sums = {
        name: torch.zeros_like(entry, dtype=torch.float32) for name, entry in parameters.items()
    }
    for sample in samples:
        batch = Batch((sample,), (True,))
        while True:
            loss = model(batch) / batch.supervised_tokens
            gradients = torch.autograd.grad(loss * scale, list(parameters.values()))
            if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
                break
            scale /= 2
            if scale < 1:
                raise NumericError(f"{sample.id}: its gradient is not finite; use another dtype")
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total.addcmul_(gradient.float() / scale, gradient.float() / scale)
    return sums
