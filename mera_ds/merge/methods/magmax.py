"""MagMax (Marczak et al. 2024, arXiv 2407.06322): of each entry, the largest by magnitude.

    τ_ok = λ · (Δ_j)_ok,   j = argmax_j |(Δ_j)_ok|

over the stages' own deltas, entry by entry: the result is dense.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mera_ds.merge.methods.base import merge_dense
from mera_ds.merge.updates import LayerMerge, Update


@dataclass(frozen=True, kw_only=True)
class Options:
    """How long the result is."""

    value: float = 1.0
    """λ"""
    rank: int | None = None
    """Rank at which a lineage keeps the result; default: the sum of the deltas' ranks."""


def merge(
    updates: Sequence[Update], layers: Sequence[str], options: Options
) -> Iterator[LayerMerge]:
    """Merge all deltas as they were trained; dense."""
    return merge_dense(updates, layers, partial(combine, options))


def combine(
    options: Options, layer: str, stages: Sequence[int], deltas: Sequence[Tensor]
) -> Tensor:
    """Return τ of dense updates of any shape."""
    first, *others = deltas
    for matrix in others:
        first = torch.where(matrix.abs() > first.abs(), matrix, first)
    return options.value * first
