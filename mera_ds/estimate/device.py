"""How fast this machine multiplies and reads, measured in a moment."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from mera_ds.estimate.memory import Device


@dataclass(frozen=True)
class Speed:
    """What a device does at best."""

    device: Device
    name: str
    flops: float
    """Matrix products, operations per second in the profile's dtype."""
    bandwidth: float
    """Bytes per second, read and written."""


A6000 = Speed("cuda", "RTX A6000, by its data sheet", 154.8e12, 768e9)
"""The paper's card, for a profile in half precision on a machine without a GPU."""
UTILISATION: dict[Device, float] = {"cuda": 0.45, "cpu": 0.5}
"""Assumed share of `flops` that a training step reaches."""


def measure_speed(dtype: str, seconds: float = 0.3) -> Speed:
    """Measure the device that training would use; without a GPU, half precision is `A6000`'s.

    Args:
        dtype: `fp32`, `fp16` or `bf16`.
        seconds: how long each of the two measurements takes.
    """
    import torch

    cuda = torch.cuda.is_available()
    if not cuda and dtype != "fp32":
        return A6000
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    side, numbers = (8192, 1 << 30) if cuda else (768, 1 << 25)
    device = "cuda" if cuda else "cpu"
    # Random numbers: with constant ones a GPU draws less power and is faster than it ever is.
    left = torch.randn(side, side, dtype=kinds[dtype], device=device)
    product = torch.empty_like(left)
    source = torch.zeros(numbers, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    wait: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
    rate = _repeats(lambda: torch.mm(left, left, out=product), seconds, wait)
    copies = _repeats(lambda: target.copy_(source), seconds, wait)
    return Speed(
        device="cuda" if cuda else "cpu",
        name=torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        flops=2.0 * side**3 * rate,
        bandwidth=2.0 * numbers * copies,
    )


def _repeats(work: Callable[[], object], seconds: float, wait: Callable[[], None]) -> float:
    """Return how often a second something can be done, at the best of several tries."""
    work()
    wait()
    best = 0.0
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        before = time.perf_counter()
        for _ in range(4):
            work()
        wait()
        best = max(best, 4 / (time.perf_counter() - before))
    return best
