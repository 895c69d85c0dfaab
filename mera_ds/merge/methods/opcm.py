"""Orthogonal projection-based continual merging (OPCM, arXiv 2501.09522).

With M = Σ_{j<i} Δ'_j = U Σ Vᵀ the sum of what was merged so far, the newest delta loses what lies
in M's leading directions, and what lies on the diagonal of the others:

    Δ'_i = Σ_{p,q > a, p ≠ q} ⟨Δ_i, u_p v_qᵀ⟩ u_p v_qᵀ          θ_i = θ_0 + 1/λ_i · Σ_{j≤i} Δ'_j

where the first a singular values make up the share α of their sum, and λ_i = ‖Σ_j Δ'_j‖ over the
mean of ‖Δ_j‖ keeps the update as long as one stage's; it grows like √i.

The paper takes full bases U and V. Beyond the rank of M their vectors are arbitrary, and so is the
"diagonal" there; for low-rank deltas that is nearly all of it. Here the diagonal is removed only on
the support of M (singular values > 0); outside it, nothing is. So the result depends on the deltas
alone and can be computed from their factors; its rank is at most that of Δ_i plus that of M.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mera_ds.merge.factors import LowRank, norm, singular, support, total
from mera_ds.merge.methods.base import require_share
from mera_ds.merge.updates import LayerMerge, Update, present


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much of the merged update is protected."""

    alpha: float = 0.5
    """α: share of the sum of singular values whose directions the newest delta may not touch."""

    def __post_init__(self) -> None:
        """Check the range."""
        require_share("alpha", self.alpha)


def merge(
    updates: Sequence[Update], layers: Sequence[str], options: Options
) -> Iterator[LayerMerge]:
    """Project the newest delta and give all the coefficient 1/λ."""
    for layer in layers:
        *older, newest = present(updates, layer)
        merged = total(older)
        projected = project(newest, merged, options.alpha)
        lengths = [norm(delta) for delta in present(updates, layer, trained=True)]
        scale = norm(total([merged, projected])) / (sum(lengths) / len(lengths) or 1.0)
        yield LayerMerge(layer, (1 / scale if scale > 0 else 1.0,) * len(updates), projected)


def project(delta: LowRank, merged: LowRank, alpha: float) -> LowRank:
    """Return Δ'_i, in factors."""
    found = singular(merged)
    rank = support(found)
    if rank == 0:
        return delta
    shares = found.values[:rank].cumsum(0) / found.values[:rank].sum()
    leading = min(rank, int((shares < alpha - 1e-12).sum()) + 1) if alpha > 0 else 0
    u, v = found.u[:, :rank], found.v[:, :rank]
    top_u, top_v = u[:, :leading], v[:, :leading]
    left = delta.left - top_u @ (top_u.T @ delta.left)
    right = delta.right - (delta.right @ top_v) @ top_v.T
    if leading == rank:
        return LowRank(left, right)
    rest_u, rest_v = u[:, leading:], v[:, leading:]
    diagonal = ((rest_u.T @ left) * (right @ rest_v).T).sum(dim=1)
    return LowRank(
        torch.cat([left, -rest_u * diagonal], dim=1), torch.cat([right, rest_v.T], dim=0)
    )
