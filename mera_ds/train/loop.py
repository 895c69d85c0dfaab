"""The loop: every phase of every method is this one, with other parameters, data and rates.

It knows no modality, no method and no DeepSpeed. One optimizer step is: count the supervised
tokens of the global batch, run this rank's micro-batches, step, log, and now and then save.
"""

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil
import torch
import torch.distributed
from torch import Tensor

from mera_ds.batch import Batch
from mera_ds.config import ExecutionConfig, PhaseConfig
from mera_ds.data.loader import StepLoader
from mera_ds.distributed import World, require_equal
from mera_ds.errors import Interrupted, NumericError
from mera_ds.files import failpoint
from mera_ds.log import Metrics, format_duration, logger
from mera_ds.model.build import seed_everything
from mera_ds.train.engine import Engine
from mera_ds.train.saving import Saver
from mera_ds.train.schedule import learning_rate_factor
from mera_ds.train.state import Progress, load_checkpoint
from mera_ds.train.timing import TimeShares

SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Phase:
    """One phase to train: its name, settings, rates, and where and as what it is saved."""

    name: str
    settings: PhaseConfig
    rates: Mapping[str, float]
    """Peak learning rate per trainable set."""
    folder: Path
    key: str
    seed: int


def train_phase(
    engine: Engine,
    loader: StepLoader,
    phase: Phase,
    execution: ExecutionConfig,
    world: World,
    metrics: Metrics,
) -> None:
    """Train from the newest checkpoint, or from the start, to the end of the phase.

    Raises:
        Interrupted: after a checkpoint, if SIGTERM or Ctrl-C asked to stop.
        NumericError: if too many steps were not finite.
        RankError: before the first step, if the ranks would take different steps.
    """
    if world.size > 1:
        facts = (phase.key, loader.total_steps, loader.order_hash())
        require_equal(facts, "data and settings, number of steps or order of the data")
    progress = _resume(engine, phase)
    console = _Console(phase.name, progress.step, loader.total_steps)
    saver = Saver(phase.folder, phase.key, execution, world)
    clock = TimeShares()
    with _stop_signal() as stop, saver:
        for step, batches in clock.over(loader.batches(progress.step)):
            failpoint("train.step")
            seed_everything(phase.seed, phase.name, step, world.rank)
            tokens, stopping, failed = _agree(batches, stop, saver)
            if failed:
                saver.finish()
            rates = _rates(phase, step, loader.total_steps)
            started = time.monotonic()
            share = _accumulate(engine, batches, tokens)
            applied = engine.step(rates)
            loss = _sum_over_ranks(share)
            faulty = not applied and not engine.only_lowered_scale(loss)
            progress = Progress(step + 1, progress.nonfinite_steps + faulty)
            if faulty:
                _report_nonfinite(loader, step, loss, progress, execution)
            elif not applied:
                logger.info("step %d: skipped, fp16's loss scale was too high for it", step)
            figures = {
                "loss": loss,
                "lr": next(iter(rates.values())),
                "tokens_per_second": tokens / max(1e-9, time.monotonic() - started),
                "memory_gb": _memory_gb(),
                **clock.shares(),
            }
            metrics.write(phase.name, step + 1, figures)
            console.line(step + 1, figures)
            due = progress.step % execution.save_every == 0 and progress.step < loader.total_steps
            if stopping:
                break
            if due:
                with clock.spent_on("save_wait"):
                    _save(engine, saver, progress)
        if _agree((), stop, saver)[1]:
            _save(engine, saver, progress)
            saver.finish()
            raise Interrupted(
                f"{phase.name}: stopped at step {progress.step} of {loader.total_steps}, saved; "
                "run the same command to continue"
            )
        saver.finish()


def _resume(engine: Engine, phase: Phase) -> Progress:
    found = load_checkpoint(phase.folder, phase.key)
    if found is None:
        return Progress(0, 0)
    progress, state = found
    engine.load_state(state)
    return progress


def _save(engine: Engine, saver: Saver, progress: Progress) -> None:
    saver.save(engine.state, progress)


def _agree(batches: Sequence[Batch], stop: list[bool], saver: Saver) -> tuple[int, bool, bool]:
    """Return what all ranks have to know, each from its own part.

    That is the global number of supervised tokens, whether any rank was asked to stop, and whether
    the last checkpoint could not be written.
    """
    tokens = sum(batch.supervised_tokens for batch in batches)
    own = torch.tensor([tokens, int(stop[0]), int(saver.failed)])
    if torch.distributed.get_world_size() > 1:
        own = own.to("cuda") if torch.cuda.is_available() else own
        torch.distributed.all_reduce(own)
    tokens, stopping, failed = own.tolist()
    return tokens, stopping > 0, failed > 0


def _sum_over_ranks(value: Tensor) -> float:
    if torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(value)
    return float(value)


def _accumulate(engine: Engine, batches: Sequence[Batch], tokens: int) -> Tensor:
    last = len(batches) - 1
    losses = [
        engine.backward(batch, tokens, position == last) for position, batch in enumerate(batches)
    ]
    return torch.stack(losses).sum()


def _rates(phase: Phase, step: int, total: int) -> dict[str, float]:
    factor = learning_rate_factor(phase.settings, step, total)
    return {name: factor * rate for name, rate in phase.rates.items()}


def _report_nonfinite(
    loader: StepLoader, step: int, loss: float, progress: Progress, execution: ExecutionConfig
) -> None:
    samples = ", ".join(loader.sample_ids(step)[:8])
    logger.warning(
        "step %d: loss %s or its gradient is not finite; skipped: %s", step, loss, samples
    )
    if progress.nonfinite_steps > execution.max_nonfinite_steps:
        raise NumericError(
            f"{progress.nonfinite_steps} steps were not finite, more than "
            f"execution.max_nonfinite_steps={execution.max_nonfinite_steps}; the last one held "
            f"{samples}. Lower the learning rate, or use backbone.dtype=bf16"
        )


def _memory_gb() -> float:
    """Peak GPU memory, or resident memory on a CPU, in GB (1e9 bytes)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9


class _Console:
    """One line every few seconds: step, loss, rate, speed, memory, time left."""

    def __init__(self, name: str, first: int, total: int) -> None:
        self._name = name
        self._first = first
        self._total = total
        self._started = self._printed = time.monotonic()

    def line(self, done: int, figures: dict[str, float]) -> None:
        now = time.monotonic()
        ends = done in (self._first + 1, self._total)
        if not ends and now - self._printed < SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        left = (now - self._started) / (done - self._first) * (self._total - done)
        logger.info(
            "%s  step %d/%d  loss %.3f  lr %.1e  %.0f label tokens/s  %.2f GB  %s left",
            self._name,
            done,
            self._total,
            figures["loss"],
            figures["lr"],
            figures["tokens_per_second"],
            figures["memory_gb"],
            format_duration(left),
        )


@contextmanager
def _stop_signal() -> Iterator[list[bool]]:
    """Turn the first SIGTERM or Ctrl-C into a request to stop; a second one ends the process."""
    requested = [False]

    def request(number: int, frame: FrameType | None) -> None:
        requested[0] = True
        signal.signal(number, signal.SIG_DFL)
        logger.info("stopping at the end of this step; once more ends at once")

    previous = {
        number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if requested[0]:  # behind the last look at it
        raise KeyboardInterrupt
