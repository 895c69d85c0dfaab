"""How two models on disk are merged: by what the update counts, or by a method on two updates.

The moving average and its like are  θ_i = θ_{i−1} + λ Δ_i  with  Δ_i = θ_tuned − θ_{i−1}.  Other
methods need θ_0, the model before the first stage (`--base`): they make

    θ_i = θ_0 + τ(Δ_1, Δ_i)      Δ_1 = θ_{i−1} − θ_0

so all earlier stages together are one update, as they were merged. At stage 2 that is what a run's
lineage does; later, a lineage knows every stage's own update, and two folders do not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mera_ds.errors import InputError
from mera_ds.mergeconfig import CMA

if TYPE_CHECKING:  # the moving average needs no torch
    from torch import Tensor

Weight = Fraction | float


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One method with its options, for one stage."""

    name: str
    options: Mapping[str, Any]
    stage: int
    weights: Callable[[Sequence[str]], Mapping[str, Weight]]
    """Layers → λ of each; not called where there is a base."""
    combine: "Callable[[str, Sequence[Tensor]], Tensor] | None" = None
    """(layer, [Δ_1, Δ_i]) → τ, all fp32 of the weight's shape."""
    base: Path | None = None
    warning: str | None = None
    """What is known against the method on LoRA deltas."""


def open_rule(name: str, options: Mapping[str, Any], stage: int, base: Path | None) -> Rule:
    """Return the rule that a command asks for.

    Args:
        name: of the method.
        options: its options.
        stage: i.
        base: folder of θ_0, if there is one.

    Raises:
        InputError: if the method or an option is unknown, is not defined for two folders, lacks
            its base, or has no use for one.
    """
    if name == CMA and not options:
        _require_no_base(name, base)
        return Rule(
            name=name,
            options={},
            stage=stage,
            weights=lambda layers: dict.fromkeys(layers, Fraction(1, stage)),
        )
    from mera_ds.merge.methods import METHODS, open_method

    method = open_method(name, options)
    facts: dict[str, Any] = {"name": name, "options": dict(options), "stage": stage}
    weights, combine = method.kind.weights, method.kind.combine
    if weights is not None:
        _require_no_base(name, base)
        return Rule(**facts, weights=lambda layers: weights(method.options, layers, stage))
    if combine is None:
        defined = [other for other, kind in METHODS.items() if kind.weights or kind.combine]
        raise InputError(
            f"--method {name} acts on the low-rank deltas of a run and is not defined for whole "
            f"checkpoints; use 'mera-ds lineage reweight RUN --method {name}', or one of "
            f"{', '.join([CMA, *defined])}"
        )
    if base is None:
        raise InputError(
            f"--method {name} compares updates of the model before the first stage; give its "
            "folder as --base"
        )
    return Rule(
        **facts,
        weights=lambda layers: dict.fromkeys(layers, 1.0),
        combine=lambda layer, deltas: combine(method.options, layer, (1, stage), deltas),
        base=base,
        warning=method.kind.warning,
    )


def _require_no_base(name: str, base: Path | None) -> None:
    if base is not None:
        raise InputError(f"--base is of no use to --method {name}; leave it out")
