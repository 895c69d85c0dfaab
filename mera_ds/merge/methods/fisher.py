"""The newest delta's weight in closed form, from Fisher information.

`became` (arXiv 2504.02666): with the merged model as the optimum of the earlier stages and a
Laplace approximation of their losses, the best point on the way from θ_{i−1} to θ_tuned has

    λ = Δ_iᵀ F_i Δ_i / Δ_iᵀ (F_1 + … + F_i) Δ_i

`pm` (Perturb-and-Merge, arXiv 2505.22389): the optimum of stage j is its own tuned model θ_j, so

    λ = − Σ_{j≤i} (θ_{i−1} − θ_j)ᵀ F_j Δ_i / Σ_{j≤i} Δ_iᵀ F_j Δ_i

with θ_{i−1} − θ_j = (c_j − 1)·Δ_j + Σ_{j<k<i} c_k·Δ_k. F_j is the diagonal Fisher information of
stage j (see `mera_ds.merge.fisher`), every stage counting the same. λ is kept in [0, 1].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mera_ds.merge.factors import LowRank, total
from mera_ds.merge.methods.base import weigh_newest
from mera_ds.merge.updates import LayerMerge, Update, present


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which estimator, and for what."""

    estimator: Literal["pm", "became"] = "became"
    per: Literal["model", "layer"] = "model"
    """One λ for the whole backbone, or one for each layer."""


def merge(
    updates: Sequence[Update], layers: Sequence[str], options: Options
) -> Iterator[LayerMerge]:
    """Set the coefficient of the newest delta.

    Raises:
        DataError: if the Fisher information of a stage was not saved.
    """
    parts = {layer: _parts(updates, layer, options.estimator) for layer in layers}
    whole = tuple(sum(column) for column in zip(*parts.values(), strict=True))
    chosen = parts if options.per == "layer" else dict.fromkeys(layers, whole)
    return weigh_newest(updates, layers, {layer: _ratio(*chosen[layer]) for layer in layers})


def _ratio(numerator: float, denominator: float) -> float:
    """Return λ; where no loss depends on the delta, that of an average."""
    return min(1.0, max(0.0, numerator / denominator)) if denominator > 0 else 0.5


def _parts(updates: Sequence[Update], layer: str, estimator: str) -> tuple[float, float]:
    """Return numerator and denominator of λ."""
    deltas = present(updates, layer)
    newest = deltas[-1]
    fishers = [update.fisher(layer) for update in updates]
    denominator = sum(fisher.product(newest, newest) for fisher in fishers)
    numerator = fishers[-1].product(newest, newest)
    if estimator == "pm":
        for position, fisher in enumerate(fishers[:-1]):
            numerator -= fisher.product(_since(updates, deltas, layer, position), newest)
    return numerator, denominator


def _since(
    updates: Sequence[Update], deltas: Sequence[LowRank], layer: str, position: int
) -> LowRank:
    """Return θ_{i−1} − θ_j: what merging and later stages have changed of a tuned model."""
    weights = [float(update.coefficient_of(layer)) for update in updates]
    weights[position] -= 1
    since = range(position, len(updates) - 1)
    return total([deltas[place] * weights[place] for place in since])
