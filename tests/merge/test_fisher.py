"""Fisher information from Adam's moments, where it can be known exactly."""

import torch

from mera_ds.merge.factors import LowRank, compress, factorise, inner, singular
from mera_ds.merge.fisher import Marginals, marginals_from_moments


def test_a_product_of_marginals_is_found_exactly() -> None:
    """Moments that uncorrelated gradients with such a Fisher information would have."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*size, generator=generator) for size in ((5, 3), (3, 7)))
    rows, columns = (torch.rand(size, generator=generator) for size in (5, 7))
    fisher, scale = rows[:, None] * columns[None], 2.0
    moments = {
        "l.lora_B": scale**2 * fisher @ right.square().T,
        "l.lora_A": scale**2 * left.square().T @ fisher,
    }
    found = marginals_from_moments({"l.lora_A": right, "l.lora_B": left}, moments, scale)
    expected = found["l.rows"][:, None] * found["l.columns"][None]
    torch.testing.assert_close(expected, fisher)


def test_without_gradients_there_is_no_information() -> None:
    factors = {"l.lora_A": torch.ones(2, 3), "l.lora_B": torch.zeros(4, 2)}
    moments = {name: torch.zeros_like(tensor) for name, tensor in factors.items()}
    found = marginals_from_moments(factors, moments, 1.0)
    assert not found["l.rows"].any()
    assert not found["l.columns"].any()


def random_factors(rank: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(9, rank, generator=generator).double()
    return LowRank(left, torch.randn(rank, 12, generator=generator).double())


def test_products_in_factor_space() -> None:
    a, b = random_factors(2, 1), random_factors(3, 2)
    rows, columns = torch.rand(9).double(), torch.rand(12).double()
    weights = rows[:, None] * columns[None]
    dense = float((weights * a.dense() * b.dense()).sum())
    assert abs(Marginals(rows, columns).product(a, b) - dense) < 1e-9
    assert abs(inner(a, b) - float((a.dense() * b.dense()).sum())) < 1e-9


def test_singular_values_in_factor_space() -> None:
    for rank in (3, 10):  # also more terms than rows
        matrix = random_factors(rank, 3)
        found = singular(matrix)
        expected = torch.linalg.svdvals(matrix.dense())[: len(found.values)]
        torch.testing.assert_close(found.values, expected)
        torch.testing.assert_close((found.u * found.values) @ found.v.T, matrix.dense())


def test_the_nearest_of_a_rank() -> None:
    matrix = random_factors(6, 4)
    best = float(torch.linalg.svdvals(matrix.dense())[2:].norm())
    near, lost = compress(matrix, 2)
    assert abs(float((near.dense() - matrix.dense()).norm()) - best) < 1e-9
    assert abs(lost - best) < 1e-9
    near, lost = factorise(matrix.dense(), 2, seed=0)
    assert abs(float((near.dense() - matrix.dense()).norm()) - lost) < 1e-6
    assert lost < 1.01 * best
