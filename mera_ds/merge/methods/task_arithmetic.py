"""Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089):  θ = θ_0 + λ · Σ_j Δ_j.

The task vectors are the stages' own deltas. λ = 0.4 is what the literature takes without a
validation set (TIES, arXiv 2306.01708, appendix).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from mera_ds.merge.updates import LayerMerge, Update


@dataclass(frozen=True, kw_only=True)
class Options:
    """The common coefficient."""

    value: float = 0.4
    """λ"""


def merge(
    updates: Sequence[Update], layers: Sequence[str], options: Options
) -> Iterator[LayerMerge]:
    """Give every delta the same coefficient."""
    for layer in layers:
        yield LayerMerge(layer, (options.value,) * len(updates))


def combine(
    options: Options, layer: str, stages: Sequence[int], deltas: Sequence[Tensor]
) -> Tensor:
    """Return λ · Σ_j Δ_j of dense updates of any shape."""
    return options.value * sum(deltas[1:], deltas[0])
