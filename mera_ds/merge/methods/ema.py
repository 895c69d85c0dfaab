"""The exponential moving average (studied for sequences of tasks in TIME, arXiv 2412.06712).

    θ_i = β · θ_{i−1} + (1−β) · θ_tuned = θ_{i−1} + (1−β) · Δ_i

Each stage is trained from the average before it, so an older delta keeps its coefficient.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mera_ds.merge.methods.base import require_share, weigh_newest
from mera_ds.merge.updates import LayerMerge, Update


@dataclass(frozen=True, kw_only=True)
class Options:
    """How slow the average is."""

    decay: float = 0.5
    """β"""

    def __post_init__(self) -> None:
        """Check the range."""
        require_share("decay", self.decay)


def merge(
    updates: Sequence[Update], layers: Sequence[str], options: Options
) -> Iterator[LayerMerge]:
    """Give the newest delta the coefficient 1 − β."""
    return weigh_newest(updates, layers, weights(options, layers, len(updates)))


def weights(options: Options, layers: Sequence[str], stage: int) -> Mapping[str, float]:
    """Return what the newest update counts in each layer."""
    return dict.fromkeys(layers, 1 - options.decay)
