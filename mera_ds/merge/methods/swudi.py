"""All deltas merged anew in closed form (type of SWUDI, arXiv 2505.19892).

WUDI (arXiv 2503.08099) takes a delta's own rows as a stand-in for the inputs of its task and asks
for the update that disturbs none of them:

    min_τ Σ_j 1/‖Δ_j‖² · ‖(τ − Δ_j) Δ_jᵀ‖²

It is solved by gradient descent there. The minimum is

    τ = (Σ_j ω_j Δ_j Δ_jᵀ Δ_j) (Σ_j ω_j Δ_jᵀ Δ_j + ε I)⁻¹        ω_j = 1/‖Δ_j‖²

in which ε damps directions that hardly any delta uses (a spectral filter; ε is `filter` times the
largest eigenvalue). Deltas whose rows are orthogonal are simply added. τ lives in the span of all
rows, so it has at most the sum of their ranks; it takes the place of the newest delta, and the
others count 0.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mera_ds.errors import InputError
from mera_ds.merge.factors import LowRank, norm
from mera_ds.merge.methods.base import joint
from mera_ds.merge.updates import LayerMerge, Update, present


@dataclass(frozen=True, kw_only=True)
class Options:
    """Filter and length of the result."""

    filter: float = 1e-3
    """ε over the largest eigenvalue."""
    value: float = 1.0
    """Factor on τ."""

    def __post_init__(self) -> None:
        """Check the range."""
        if self.filter <= 0:
            raise InputError(f"filter is {self.filter}; it must be above 0")


def merge(
    updates: Sequence[Update], layers: Sequence[str], options: Options
) -> Iterator[LayerMerge]:
    """Solve every layer by itself, from the deltas as they were trained."""
    for layer in layers:
        deltas = present(updates, layer, trained=True)
        yield joint(updates, layer, solve(deltas, options.filter) * options.value)


def solve(deltas: Sequence[LowRank], share: float) -> LowRank:
    """Return τ in factors: left is that of all deltas, side by side."""
    basis, _ = torch.linalg.qr(torch.cat([delta.right for delta in deltas], dim=0).T)
    gram = basis.new_zeros(basis.shape[1], basis.shape[1])
    targets = []
    for delta in deltas:
        length = norm(delta)
        rows = delta.right @ basis  # (r, k)
        within = rows.T @ (delta.left.T @ delta.left) @ rows  # Δᵀ Δ in the basis
        weight = 1 / length**2 if length > 0 else 0.0
        gram += weight * within
        targets.append(weight * rows @ within)
    largest = float(torch.linalg.eigvalsh(gram)[-1]) if len(gram) else 0.0
    damped = gram + (share * largest or 1.0) * torch.eye(len(gram)).to(gram)
    right = torch.linalg.solve(damped, torch.cat(targets, dim=0).T).T @ basis.T
    return LowRank(torch.cat([delta.left for delta in deltas], dim=1), right)
