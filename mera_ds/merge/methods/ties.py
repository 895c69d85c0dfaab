"""TIES (Yadav et al. 2023, arXiv 2306.01708): trim, elect a sign, average those that agree.

    τ = λ · mean over {j : sign(Δ_j) = s} of Δ_j,   s = sign(Σ_j Δ_j)

after each Δ_j kept only its `density` largest entries by magnitude, all per weight matrix and
entry by entry: the result is dense. On LoRA deltas the premise (few large entries, conflicting
signs) does not hold: RobustMerge (arXiv 2502.17159) finds it below the unmerged model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mera_ds.merge.methods.base import merge_dense, require_share
from mera_ds.merge.updates import LayerMerge, Update


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much is kept, how long the result is."""

    density: float = 0.2
    value: float = 1.0
    """λ"""
    rank: int | None = None
    """Rank at which a lineage keeps the result; default: the sum of the deltas' ranks."""

    def __post_init__(self) -> None:
        """Check the range."""
        require_share("density", self.density)


def merge(
    updates: Sequence[Update], layers: Sequence[str], options: Options
) -> Iterator[LayerMerge]:
    """Merge all deltas as they were trained; dense."""
    return merge_dense(updates, layers, partial(combine, options))


def combine(
    options: Options, layer: str, stages: Sequence[int], deltas: Sequence[Tensor]
) -> Tensor:
    """Return τ of dense updates of any shape."""
    return options.value * elect([trim(delta, options.density) for delta in deltas])


def trim(matrix: Tensor, density: float) -> Tensor:
    """Keep the largest entries by magnitude, set the others to 0."""
    kept = round(density * matrix.numel())
    if kept == 0:
        return torch.zeros_like(matrix)
    least = matrix.abs().flatten().kthvalue(matrix.numel() - kept + 1).values
    return matrix * (matrix.abs() >= least)


def elect(trimmed: Sequence[Tensor]) -> Tensor:
    """Average, entry by entry, those that have the sign of the sum."""
    sign = sum(trimmed[1:], trimmed[0]).sign()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for matrix in trimmed:
        agrees = (matrix.sign() == sign) & (matrix != 0)
        total += matrix * agrees
        count += agrees
    return total / count.clamp(min=1)
