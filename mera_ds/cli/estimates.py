"""How `mera-ds plan` prints what steps will take."""

from collections.abc import Sequence

from mera_ds.errors import MeraError
from mera_ds.estimate.device import A6000, UTILISATION, Speed, measure_speed
from mera_ds.estimate.steps import Estimate, Estimator, try_estimate
from mera_ds.log import format_duration
from mera_ds.plan import MergeStep
from mera_ds.sequence import Run

GB = 1e9


def describe_estimates(run: Run) -> tuple[list[str], list[str]]:
    """Return a line for every step of the plan, and the lines below them."""
    speed = measure_speed(run.config.backbone.dtype)
    try:
        estimator = Estimator(run.config, run.folder, speed)
    except MeraError as error:
        return ["no estimate"] * len(run.plan.steps), [f"no estimates: {error}"]
    found = [try_estimate(estimator, step) for step in run.plan.steps]
    lines = [
        f"no estimate: {entry}"
        if isinstance(entry, str)
        else _line(entry, speed, merges=isinstance(step, MergeStep))
        for entry, step in zip(found, run.plan.steps, strict=True)
    ]
    whole = [entry for entry in found if isinstance(entry, Estimate)]
    return lines, [_sum(whole), _basis(whole, speed)] if whole else []


def _line(estimate: Estimate, speed: Speed, *, merges: bool) -> str:
    words = []
    if not merges:
        words.append(f"{estimate.samples} samples")
        words += [f"{estimate.steps} steps"] if estimate.steps else []
        place = "GPU memory" if speed.device == "cuda" else "memory"
        words.append(f"{estimate.memory / GB:.1f} GB of {place}")
    words.append(format_duration(estimate.seconds) + (" (measured)" if estimate.measured else ""))
    if estimate.disk:
        meanwhile = f" (and {_gb(estimate.disk_meanwhile)} meanwhile)"
        words.append(
            f"{_gb(estimate.disk)} on disk" + (meanwhile if estimate.disk_meanwhile else "")
        )
    if estimate.judge_calls:
        cost = "" if estimate.dollars is None else f" for at most ${estimate.dollars:.2f}"
        words.append(f"{estimate.judge_calls} calls of the judge{cost}")
    return ", ".join(words)


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB" if size >= GB / 10 else f"{size / 1e6:.1f} MB"


def _sum(estimates: Sequence[Estimate]) -> str:
    seconds = sum(entry.seconds for entry in estimates)
    disk = sum(entry.disk for entry in estimates)
    calls = sum(entry.judge_calls for entry in estimates)
    memory = max(entry.memory for entry in estimates)
    judge = f", {calls} calls of the judge" if calls else ""
    dollars = sum(entry.dollars or 0.0 for entry in estimates)
    judge += f" for at most ${dollars:.2f}" if dollars else ""
    return (
        f"estimated in all: {format_duration(seconds)}, {memory / GB:.1f} GB of memory at most, "
        f"{_gb(disk)} on disk{judge}"
    )


def _basis(estimates: Sequence[Estimate], speed: Speed) -> str:
    share = UTILISATION[speed.device]
    source = "" if speed is A6000 else " measured on this machine"
    rate = (
        f"times from {speed.flops / 1e12:.3g} TFLOP/s in matrix products and "
        f"{speed.bandwidth / GB:.0f} GB/s{source} ({speed.name}), {share:.0%} of it used"
    )
    if any(entry.from_paper for entry in estimates):
        rate += "; sizes of missing datasets from the paper's table 6"
    return rate
