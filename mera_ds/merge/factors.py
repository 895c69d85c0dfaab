"""Linear algebra on matrices that are given as a product of two thin ones.

A LoRA delta is  left @ right  with (out, r) and (r, in). Norms, products, projections and singular
values of such matrices are those of r × r matrices; nothing here has the size of the weight.
Arithmetic is in fp64, which costs little at these sizes and leaves no error to speak of; only
`gram` multiplies in fp32, and adds up in fp64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 1024
"""Rows whose products are added up in fp32."""

_ELEMENTS = 1 << 20
"""Elements of dense tensors that are in fp64 at once."""


@dataclass(frozen=True)
class LowRank:
    """The matrix left @ right."""

    left: Tensor
    """(out, r)"""
    right: Tensor
    """(r, in)"""

    @property
    def rank(self) -> int:
        """The number of terms; the matrix may have a smaller rank."""
        return self.right.shape[0]

    def double(self) -> "LowRank":
        """Return the same in fp64."""
        return LowRank(self.left.double(), self.right.double())

    def dense(self) -> Tensor:
        """Return the matrix (out, in); only for methods that can't do without it."""
        return self.left @ self.right

    def __mul__(self, factor: float) -> "LowRank":
        return LowRank(self.left * factor, self.right)


@dataclass(frozen=True)
class Singular:
    """A matrix as u @ diag(values) @ v.T with orthonormal columns, values falling."""

    u: Tensor
    """(out, k)"""
    values: Tensor
    """(k,)"""
    v: Tensor
    """(in, k)"""


def total(parts: Sequence[LowRank]) -> LowRank:
    """Return the sum of some matrices: its rank is the sum of theirs."""
    return LowRank(
        torch.cat([part.left for part in parts], dim=1),
        torch.cat([part.right for part in parts], dim=0),
    )


def inner(
    a: LowRank, b: LowRank, rows: Tensor | None = None, columns: Tensor | None = None
) -> float:
    """Return Σ rows_o · columns_k · a_ok · b_ok; weights that aren't given are 1.

    It is  tr((Lᵃᵀ diag(rows) Lᵇ) (Rᵇ diag(columns) Rᵃᵀ)).
    """
    left = a.left if rows is None else a.left * rows[:, None]
    right = b.right if columns is None else b.right * columns[None]
    return float(((left.T @ b.left) * (a.right @ right.T)).sum())


def gram(parts: Sequence[LowRank]) -> Tensor:
    """Return all  ⟨a_i, a_j⟩ = Σ_ok a_i,ok · a_j,ok  as an fp64 matrix (parts, parts).

    Factors are multiplied in fp32, a thousand rows at a time, and added up in fp64: twice as fast
    as fp64, and within 1e-7 of ‖a_i‖ ‖a_j‖, whatever the size.
    """
    left = [part.left.float() for part in parts]
    right = [part.right.float().T for part in parts]
    found = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for i in range(len(parts)):
        for j in range(i + 1):
            value = (_crossed(left[i], left[j]) * _crossed(right[i], right[j])).sum()
            found[i, j] = found[j, i] = value
    return found


def dense_gram(parts: Sequence[Tensor]) -> Tensor:
    """Return the same of dense tensors of one shape: products and sums in fp64, in blocks."""
    blocks = zip(*(part.flatten().split(_ELEMENTS) for part in parts), strict=True)
    found = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for block in blocks:
        rows = torch.stack(block).double()
        found += rows @ rows.T
    return found


def _crossed(a: Tensor, b: Tensor) -> Tensor:
    """Return aᵀ b in fp64."""
    found = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64)
    for rows, others in zip(a.split(_ROWS), b.split(_ROWS), strict=True):
        found += rows.T @ others
    return found


def norm(a: LowRank) -> float:
    """Return the Frobenius norm."""
    return max(0.0, inner(a, a)) ** 0.5


def singular(a: LowRank) -> Singular:
    """Return the singular value decomposition, by QR of both factors and SVD of r × r."""
    q_left, r_left = torch.linalg.qr(a.left.double())
    q_right, r_right = torch.linalg.qr(a.right.double().T)
    u, values, vh = torch.linalg.svd(r_left @ r_right.T)
    return Singular(q_left @ u[:, : len(values)], values, q_right @ vh[: len(values)].T)


def support(found: Singular) -> int:
    """Return how many singular values are not zero but for rounding."""
    if not len(found.values) or float(found.values[0]) == 0:
        return 0
    size = max(len(found.u), len(found.v))
    least = float(found.values[0]) * size * torch.finfo(torch.float64).eps
    return int((found.values > least).sum())


def compress(a: LowRank, rank: int) -> tuple[LowRank, float]:
    """Return the nearest matrix of a rank, and the Frobenius norm of the difference.

    Both factors get the square root of the singular values.
    """
    found = singular(a)
    root = found.values[:rank].sqrt()
    near = LowRank(found.u[:, :rank] * root, root[:, None] * found.v[:, :rank].T)
    return near, float(found.values[rank:].norm())


def factorise(matrix: Tensor, rank: int, seed: int) -> tuple[LowRank, float]:
    """Return a matrix of a rank near a dense one, and the Frobenius norm of the difference.

    By a randomised range finder (Halko et al. 2011, arXiv 0909.4061) with two power iterations: for
    results that are dense, whose exact decomposition would take minutes a tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    width = min(rank + 16, *matrix.shape)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis, _ = torch.linalg.qr(matrix @ start)
    for _ in range(2):
        back, _ = torch.linalg.qr(matrix.T @ basis)
        basis, _ = torch.linalg.qr(matrix @ back)
    near, _ = compress(LowRank(basis.double(), (basis.T @ matrix).double()), rank)
    # Rounding can make the difference of squares negative where the matrix has this rank.
    square = float(matrix.double().square().sum()) - norm(near) ** 2
    return near, max(0.0, square) ** 0.5
