"""What the methods share."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction

from torch import Tensor

from mera_ds.errors import InputError
from mera_ds.merge.factors import LowRank
from mera_ds.merge.updates import Coefficient, LayerMerge, Update, present

ONLY_NEWEST = Fraction(0), Fraction(1)
"""Coefficients of the older deltas and of the newest, where it stands for all of them."""


def weigh_newest(
    updates: Sequence[Update], layers: Sequence[str], weights: Mapping[str, Coefficient]
) -> Iterator[LayerMerge]:
    """Set the coefficient of the newest delta and leave the older ones as they are."""
    for layer in layers:
        older = [update.coefficient_of(layer) for update in updates[:-1]]
        yield LayerMerge(layer, (*older, weights[layer]))


def joint(updates: Sequence[Update], layer: str, merged: LowRank | Tensor) -> LayerMerge:
    """Let the newest delta stand for all of them."""
    older, newest = ONLY_NEWEST
    return LayerMerge(layer, (*[older] * (len(updates) - 1), newest), merged)


def merge_dense(
    updates: Sequence[Update],
    layers: Sequence[str],
    combine: Callable[[str, Sequence[int], Sequence[Tensor]], Tensor],
) -> Iterator[LayerMerge]:
    """Merge all deltas of each layer, as they were trained, by a rule for dense matrices.

    Args:
        updates: the lineage's.
        layers: names of linear layers.
        combine: gives τ of a layer, the stages and their deltas.
    """
    stages = [update.stage for update in updates]
    for layer in layers:
        deltas = [delta.dense().float() for delta in present(updates, layer, trained=True)]
        yield joint(updates, layer, combine(layer, stages, deltas))


def seed_of(*facts: object) -> int:
    """Return a seed for random numbers that belong to some facts, whatever came before."""
    digest = hashlib.sha256("/".join(map(str, facts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def require_share(name: str, value: float) -> None:
    """Raise `InputError` unless a value is in [0, 1]."""
    if not 0 <= value <= 1:
        raise InputError(f"{name} is {value}; it must be in [0, 1]")
