"""Fisher information of a stage's loss, kept as two vectors per linear layer.

The diagonal of the Fisher information of a weight W (out, in),  F_ok = E[(∂ℓ/∂W_ok)²],  is as large
as the weight. It is approximated by a product of its marginals,

    F_ok ≈ rows_o · columns_k

(as Adafactor does with Adam's second moments, arXiv 1804.04235), which takes out + in numbers and
lets  Σ F_ok X_ok Y_ok  be computed for low-rank X and Y in factor space.

The marginals come at no cost from the second moments of the LoRA factors at the end of training
(arXiv 2509.23592: "second moments as free Fisher"). With W = W_0 + s·B A and a gradient G of W,
∂ℓ/∂B = s·G Aᵀ and ∂ℓ/∂A = s·Bᵀ G. If the entries of G are uncorrelated, then
E[(∂ℓ/∂B_oj)²] = s² Σ_k F_ok A_jk² and E[(∂ℓ/∂A_jk)²] = s² Σ_o F_ok B_oj²; so the sums over j of the
two are proportional to rows and columns, and the first one gives their common factor. The
gradients are those of batches, the same for all stages of a run.

Instead, squared gradients of the same factors can be measured behind the training, on a share of
the stage's data and of single samples (`merge.fisher=data`; `mera_ds.train.importance`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mera_ds.merge.factors import LowRank, inner


@dataclass(frozen=True)
class Marginals:
    """F_ok ≈ rows_o · columns_k of one layer."""

    rows: Tensor
    """(out,)"""
    columns: Tensor
    """(in,)"""

    def product(self, a: LowRank, b: LowRank) -> float:
        """Return Σ F_ok a_ok b_ok."""
        return inner(a, b, self.rows, self.columns)


def marginals_from_moments(
    factors: Mapping[str, Tensor], moments: Mapping[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """Return `<module>.rows` and `<module>.columns` (fp32) of every layer.

    Args:
        factors: `<module>.lora_A` (r, in) and `<module>.lora_B` (out, r) at the end of training.
        moments: mean squared gradients of the same tensors.
        scale: alpha / rank.
    """
    found: dict[str, Tensor] = {}
    for name in factors:
        layer, _, factor = name.rpartition(".")
        if factor != "lora_A":
            continue
        moment_b = moments[f"{layer}.lora_B"].double()
        rows, columns = moment_b.sum(dim=1), moments[name].double().sum(dim=0)
        seen = float((factors[name].double().square() @ columns).sum())
        explained = scale**2 * float(rows.sum()) * seen
        common = float(moment_b.sum()) / explained if explained > 0 else 0.0
        found[f"{layer}.rows"] = (rows * common**0.5).float()
        found[f"{layer}.columns"] = (columns * common**0.5).float()
    return found
