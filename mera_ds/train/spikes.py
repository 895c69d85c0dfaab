"""Loss spikes: they are named in the log, and never a reason to stop."""

import math
import statistics
from collections import deque

FACTOR = 10.0
"""A loss this many times the median of the last steps is a spike."""
WINDOW = 32
LEAST = 4
"""Steps that must have been seen."""


class SpikeWatch:
    """The losses of the last steps of one process; it begins anew when training is continued."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Return whether a step's loss is a spike; one that is not finite is none, and not kept."""
        if not math.isfinite(loss):
            return False
        known = len(self._recent) >= LEAST
        spike = known and loss > FACTOR * statistics.median(self._recent)
        self._recent.append(loss)
        return spike
