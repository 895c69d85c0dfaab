"""How a run merges its backbones, as data. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mera_ds.errors import InputError

CMA = "cma"
"""The cumulative moving average of the paper, which is the default."""
FISHER = "fisher"
"""The method that needs Fisher information."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """The merge method of every stage and its options (see `mera_ds.merge.methods`)."""

    method: str = CMA
    options: Mapping[str, Any] = field(default_factory=dict)
    fisher: Literal["adam", "data"] = "adam"
    """Where the method `fisher` has its information from: Adam's second moments at the end of tune,
    which cost nothing, or squared gradients of single samples, measured after tune."""
    fisher_percent: float = 1.0
    """Share of the stage's data on which it is measured."""

    def __post_init__(self) -> None:
        """Check the range, and that what is measured is used."""
        if not 0 < self.fisher_percent <= 100:
            raise InputError(
                f"merge.fisher_percent is {self.fisher_percent}; it must be in (0, 100]"
            )
        if self.fisher == "data" and self.method != FISHER:
            raise InputError(
                f"merge.fisher=data is of no use to merge.method={self.method}; leave it out, or "
                f"choose merge.method={FISHER}"
            )
