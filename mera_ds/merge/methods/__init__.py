"""Merge methods: each a file with its equation and source, all over the same stream of updates.

A method is a function  (updates, layers, options) → one `LayerMerge` per layer.  What it says is
kept in the lineage as coefficients, as factors that replace the newest delta's, or, where the
result is dense, as the nearest factors of a stated rank.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, cast

from torch import Tensor

from mera_ds.merge.methods import (
    cma,
    dare,
    ema,
    fisher,
    magmax,
    opcm,
    scale,
    slerp,
    swudi,
    task_arithmetic,
    ties,
)
from mera_ds.merge.updates import Coefficient, LayerMerge, Update
from mera_ds.settings import parse, require_known


@dataclass(frozen=True)
class Kind:
    """A method and what its result is."""

    module: ModuleType
    result: Literal["coefficients", "factors", "dense"]
    joint: bool = False
    """It merges all deltas as they were trained; what earlier merges made of them doesn't count."""
    warning: str | None = None
    weights: Callable[..., Mapping[str, Coefficient]] | None = None
    """(options, layers, stage) → λ of each layer in  θ_i = θ_{i−1} + λ Δ_i,  if that is all."""
    combine: Callable[..., Tensor] | None = None
    """(options, layer, stages, deltas) → τ of dense deltas in  θ_i = θ_0 + τ,  where defined."""


_ON_LORA = "{} on LoRA deltas can fall below the unmerged model (RobustMerge, arXiv 2502.17159)"

METHODS: Mapping[str, Kind] = {
    "cma": Kind(cma, "coefficients"),
    "scale": Kind(scale, "coefficients", weights=scale.weights),
    "ema": Kind(ema, "coefficients", weights=ema.weights),
    "slerp": Kind(slerp, "coefficients", combine=slerp.combine),
    "task-arithmetic": Kind(
        task_arithmetic, "coefficients", joint=True, combine=task_arithmetic.combine
    ),
    "fisher": Kind(fisher, "coefficients"),
    "opcm": Kind(opcm, "factors"),
    "swudi": Kind(swudi, "factors", joint=True),
    "ties": Kind(ties, "dense", joint=True, warning=_ON_LORA.format("TIES"), combine=ties.combine),
    "dare": Kind(dare, "dense", joint=True, warning=_ON_LORA.format("DARE"), combine=dare.combine),
    "magmax": Kind(magmax, "dense", joint=True, combine=magmax.combine),
}


@dataclass(frozen=True)
class Method:
    """A method with its options."""

    name: str
    kind: Kind
    options: Any

    def merge(self, updates: Sequence[Update], layers: Sequence[str]) -> Iterator[LayerMerge]:
        """Merge the newest update, layer by layer; the updates themselves are not changed."""
        run = cast(Callable[..., Iterator[LayerMerge]], self.kind.module.merge)
        return run(updates, layers, self.options)

    @property
    def rank(self) -> int | None:
        """The rank at which a lineage keeps a dense result; None: the sum of the deltas'."""
        found: int | None = getattr(self.options, "rank", None)
        return found


def open_method(name: str, options: Mapping[str, Any]) -> Method:
    """Return a method by name.

    Raises:
        InputError: if the method or an option is unknown or out of range.
    """
    require_known(name, METHODS, "merge method")
    kind = METHODS[name]
    return Method(name, kind, parse(kind.module.Options, options, f"merge method {name}"))
