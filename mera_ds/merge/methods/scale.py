"""Scaling the newest delta by a rule:  θ_i = θ_{i−1} + λ · Δ_i.

λ = 1/i is the cumulative moving average of the paper. λ = 1/√i keeps the norm of a sum of i
orthogonal deltas of equal norm, which is what OPCM's scaling tends to (arXiv 2501.09522). A
constant λ forgets the same share at every stage. Single layers can have their own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Literal

from mera_ds.errors import InputError
from mera_ds.merge.methods.base import weigh_newest
from mera_ds.merge.updates import Coefficient, LayerMerge, Update


@dataclass(frozen=True, kw_only=True)
class Options:
    """The rule for λ."""

    rule: Literal["1/i", "1/sqrt(i)", "constant"] = "1/sqrt(i)"
    value: float = 0.5
    """λ of the rule `constant`."""
    layers: Mapping[str, float] = field(default_factory=dict)
    """λ by name of the layer, with wildcards, e.g. `*.mlp.*`; the first that fits counts."""


def merge(
    updates: Sequence[Update], layers: Sequence[str], options: Options
) -> Iterator[LayerMerge]:
    """Set the coefficient of the newest delta.

    Raises:
        InputError: if a pattern fits no layer.
    """
    return weigh_newest(updates, layers, weights(options, layers, len(updates)))


def weights(options: Options, layers: Sequence[str], stage: int) -> Mapping[str, Coefficient]:
    """Return what the newest update counts in each layer.

    Raises:
        InputError: if a pattern fits no layer.
    """
    for pattern in options.layers:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise InputError(
                f"layers: '{pattern}' fits no layer of the backbone; they are called e.g. "
                f"'{layers[0]}'"
            )
    return {layer: _weight(options, layer, stage) for layer in layers}


def _weight(options: Options, layer: str, stage: int) -> Coefficient:
    for pattern, value in options.layers.items():
        if fnmatchcase(layer, pattern):
            return value
    if options.rule == "1/i":
        return Fraction(1, stage)
    return float(stage) ** -0.5 if options.rule == "1/sqrt(i)" else options.value
