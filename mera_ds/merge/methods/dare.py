"""DARE (Yu et al. 2024, arXiv 2311.03099): drop entries at random, rescale the rest, then average.

    τ = Σ_j 1/j · m_j ⊙ Δ_j / (1 − p)        m_j ∈ {0, 1}, 0 with probability p

The masks are drawn from (seed, stage, layer), so they are the same whenever they are drawn. The
result is dense, and its noise is of full rank: p = 0.9 makes it three times as long as Δ_j itself,
so no low rank comes near it. RobustMerge (arXiv 2502.17159) warns of it on LoRA deltas.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mera_ds.errors import InputError
from mera_ds.merge.methods.base import merge_dense, seed_of
from mera_ds.merge.updates import LayerMerge, Update


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much is dropped."""

    drop: float = 0.9
    """p"""
    seed: int = 0
    rank: int | None = None
    """Rank at which a lineage keeps the result; default: the sum of the deltas' ranks."""

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 <= self.drop < 1:
            raise InputError(f"drop is {self.drop}; it must be in [0, 1)")


def merge(
    updates: Sequence[Update], layers: Sequence[str], options: Options
) -> Iterator[LayerMerge]:
    """Merge all deltas as they were trained; dense."""
    return merge_dense(updates, layers, partial(combine, options))


def combine(
    options: Options, layer: str, stages: Sequence[int], deltas: Sequence[Tensor]
) -> Tensor:
    """Return τ of dense updates of any shape; those of stage j count 1/j."""
    parts = []
    for stage, matrix in zip(stages, deltas, strict=True):
        generator = torch.Generator().manual_seed(seed_of(options.seed, stage, layer))
        kept = torch.rand(matrix.shape, generator=generator) >= options.drop
        parts.append(matrix * kept / ((1 - options.drop) * stage))
    return sum(parts[1:], parts[0])
