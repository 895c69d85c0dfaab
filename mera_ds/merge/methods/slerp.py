"""Spherical interpolation (Shoemake 1985) between the updates before and after the newest stage.

With τ = Σ_{j<i} c_j Δ_j, τ' = τ + Δ_i, Ω the angle between them and t = 1/i:

    slerp(τ, τ'; t) = sin((1−t)Ω)/sin Ω · τ + sin(tΩ)/sin Ω · τ'

So older coefficients are multiplied by the sum of both factors and the newest is the second one.
Unlike an average, it keeps the length of the update. It acts on updates, not on weights: weights
before and after a stage are so nearly parallel that slerp of them is their average.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mera_ds.merge.factors import dense_gram, gram
from mera_ds.merge.methods.base import require_share
from mera_ds.merge.updates import LayerMerge, Update, present

PARALLEL = 1e-6
"""Below this angle (rad) the interpolation is linear: the factors differ from it by Ω²/6."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where between the two."""

    t: float | None = None
    """Share of the newest stage; default 1/i."""

    def __post_init__(self) -> None:
        """Check the range."""
        if self.t is not None:
            require_share("t", self.t)


def merge(
    updates: Sequence[Update], layers: Sequence[str], options: Options
) -> Iterator[LayerMerge]:
    """Interpolate in every layer by itself."""
    share = 1 / len(updates) if options.t is None else options.t
    for layer in layers:
        older = [float(update.coefficient_of(layer)) for update in updates[:-1]]
        first, second = interpolate(gram(present(updates, layer)), older, share)
        yield LayerMerge(layer, (*[factor * (first + second) for factor in older], second))


def combine(
    options: Options, layer: str, stages: Sequence[int], deltas: Sequence[Tensor]
) -> Tensor:
    """Interpolate dense updates of any shape: Σ of all but the newest, and Σ of all."""
    share = 1 / stages[-1] if options.t is None else options.t
    older = [1.0] * (len(deltas) - 1)
    first, second = interpolate(dense_gram(deltas), older, share)
    return (first + second) * sum(deltas[1:-1], deltas[0]) + second * deltas[-1]


def interpolate(products: Tensor, older: Sequence[float], share: float) -> tuple[float, float]:
    """Return the factors of τ and τ'.

    Args:
        products: ⟨Δ_i, Δ_j⟩ of all stages, the newest last; (stages, stages), fp64.
        older: coefficients of all but the newest.
        share: t.
    """
    before, after = (torch.tensor([*older, last]).double() for last in (0.0, 1.0))
    lengths = float((before @ products @ before) * (after @ products @ after)) ** 0.5
    if lengths == 0:
        return 1 - share, share
    angle = math.acos(max(-1.0, min(1.0, float(before @ products @ after) / lengths)))
    # Opposite updates have no shortest way between them.
    if angle < PARALLEL or math.pi - angle < PARALLEL:
        return 1 - share, share
    first, second = math.sin((1 - share) * angle), math.sin(share * angle)
    return first / math.sin(angle), second / math.sin(angle)
