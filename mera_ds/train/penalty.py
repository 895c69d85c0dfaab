"""EWC's penalty as a gradient (paper, appendix D):  ∂/∂θ  λ/2 · Σ F (θ − θ*)²  =  λ F (θ − θ*).

It is added to the gradient of the fp32 masters right before Adam, part by part as they lie on the
ranks, without a graph. So it is not scaled with fp16's loss, and gradient clipping, which bounds
the gradient of the data, does not see it. F and θ* are kept beside Adam's moments and cut up as
they are: 8 bytes per penalised parameter, or 4 (bf16 and fp16) where the backbone computes in half
precision.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mera_ds.checkpoint import load_part, read_manifest
from mera_ds.config import Dtype
from mera_ds.errors import DataError

IMPORTANCE, ANCHOR = "importance", "anchor"
"""Keys in the optimizer's state."""
CHUNK = 1 << 24
"""Parameters whose penalty is computed at once: what bounds the memory it takes."""


@dataclass(frozen=True)
class HeldFactors:
    """F and θ* of the parameters of one trainable set, by their names in it."""

    group: str
    strength: float
    """λ"""
    importance: Mapping[str, Tensor]
    anchor: Mapping[str, Tensor]

    def values(self, key: str) -> Mapping[str, Tensor]:
        """Return what is kept under a key of the optimizer's state."""
        return {IMPORTANCE: self.importance, ANCHOR: self.anchor}[key]


def kept_as(dtype: Dtype) -> dict[str, torch.dtype]:
    """Return the dtypes of F, which needs range, and θ*, which needs digits."""
    if dtype == "fp32":
        return {IMPORTANCE: torch.float32, ANCHOR: torch.float32}
    return {IMPORTANCE: torch.bfloat16, ANCHOR: torch.float16}


@torch.no_grad()
def add_penalty_gradient(master: Tensor, state: Mapping[str, Tensor], strength: float) -> None:
    """Add  λ F (θ − θ*)  to the gradient of a parameter, or of a flat part of many.

    Args:
        master: θ, with its gradient.
        state: F and θ* of the same shape.
        strength: λ.
    """
    assert master.grad is not None
    flat = (master.grad, master, state[IMPORTANCE], state[ANCHOR])
    parts = (tensor.detach().view(-1).split(CHUNK) for tensor in flat)
    for gradient, value, importance, anchor in zip(*parts, strict=True):
        gradient.add_((value - anchor).mul_(importance), alpha=strength)


def accumulate(
    previous: Mapping[str, Tensor], newest: Mapping[str, Tensor], decay: float
) -> dict[str, Tensor]:
    """Return  γ·F̄ + F  (online EWC)."""
    return {name: decay * previous[name] + entry for name, entry in newest.items()}


def load_importance(product: Path) -> dict[str, Tensor]:
    """Read what a `FisherStep` has measured."""
    entry = read_manifest(product).importance
    if entry is None:
        raise DataError(f"{product} holds no importances; delete it and run its step again")
    return load_part(product, entry)
