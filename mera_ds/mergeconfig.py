"""How a run merges its backbones, as data. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CMA = "cma"
"""The cumulative moving average of the paper, which is the default."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """The merge method of every stage and its options (see `mera_ds.merge.methods`)."""

    method: str = CMA
    options: Mapping[str, Any] = field(default_factory=dict)
