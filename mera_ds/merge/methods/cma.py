"""The cumulative moving average of the paper (MERA, arXiv 2503.07663, section 4.1).

θ_i = (i−1)/i · θ_{i−1} + 1/i · θ_tuned = θ_{i−1} + 1/i · Δ_i
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from mera_ds.merge.methods.base import weigh_newest
from mera_ds.merge.updates import LayerMerge, Update


@dataclass(frozen=True, kw_only=True)
class Options:
    """There is nothing to choose."""


def merge(
    updates: Sequence[Update], layers: Sequence[str], options: Options
) -> Iterator[LayerMerge]:
    """Give the newest delta the coefficient 1/i."""
    return weigh_newest(updates, layers, dict.fromkeys(layers, Fraction(1, len(updates))))
