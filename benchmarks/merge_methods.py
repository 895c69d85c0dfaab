"""Merge methods on factors against the same on dense matrices, at the size of a Llama-3-8B layer.

    python benchmarks/merge_methods.py [--outputs 4096 --inputs 14336 --rank 128]

Three stages' deltas of one layer (factors in fp32, as they are stored) are merged by the methods
that act on low-rank deltas, once in factor space and once by the dense computation of the same
equation (in fp32; building the matrices from the factors is part of it).

Equality is asserted before anything is timed: relative difference below 1e-6 from the dense result
in fp64, at an eighth of the size. At full size the difference from the dense fp32 result is
reported. It is that result's own error: a norm of 59M elements summed in fp32 is off by 1e-3 (so
the dense slerp sums in fp64 here), and swudi's Cholesky factor has a condition number of 1000. So
swudi's result is put into its equation at full size, in fp64 and on random vectors, instead of
solving 14336 equations in fp64. The result is written to benchmarks/results/merge_methods.json.
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mera_ds.machine import commit
from mera_ds.merge.factors import LowRank, gram, total
from mera_ds.merge.methods.opcm import project
from mera_ds.merge.methods.slerp import interpolate
from mera_ds.merge.methods.swudi import solve

RESULT = Path(__file__).parent / "results" / "merge_methods.json"
ALPHA, FILTER = 0.5, 1e-3
MOST_RANK = 384
"""Of the sum of three deltas of rank 128."""

Deltas = Sequence[LowRank]


def random_deltas(outputs: int, inputs: int, rank: int) -> list[LowRank]:
    """Return three stages' deltas with falling singular values."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.linspace(1, 0.05, rank).double()
    found = []
    for _ in range(3):
        left = torch.randn(outputs, rank, generator=generator).double() * spectrum
        found.append(LowRank(left, torch.randn(rank, inputs, generator=generator).double()))
    return found


def slerp_factors(deltas: Deltas) -> LowRank:
    """Interpolate between the first two and all three."""
    first, second = interpolate(gram(deltas), [1.0, 1.0], 1 / 3)
    return total([*(delta * (first + second) for delta in deltas[:2]), deltas[2] * second])


def exact_dot(a: Tensor, b: Tensor) -> float:
    """Return the inner product, summed in fp64."""
    return sum(float(row.double() @ other.double()) for row, other in zip(a, b, strict=True))


def slerp_dense(deltas: Sequence[Tensor]) -> Tensor:
    """Compute the same on dense matrices."""
    before = deltas[0] + deltas[1]
    after = before + deltas[2]
    lengths = (exact_dot(before, before) * exact_dot(after, after)) ** 0.5
    angle = math.acos(exact_dot(before, after) / lengths)
    first, second = (math.sin(t * angle) / math.sin(angle) for t in (2 / 3, 1 / 3))
    return first * before + second * after


def opcm_factors(deltas: Deltas) -> LowRank:
    """Project the third delta against the first two."""
    doubles = [delta.double() for delta in deltas]
    return project(doubles[2], total(doubles[:2]), ALPHA)


def opcm_dense(deltas: Sequence[Tensor]) -> Tensor:
    """Compute the same by a singular value decomposition of the dense merged delta."""
    merged, delta = deltas[0] + deltas[1], deltas[2]
    u, values, vh = torch.linalg.svd(merged, full_matrices=False)
    rank = int((values > values[0] * 1e-5).sum())
    shares = values[:rank].cumsum(0) / values[:rank].sum()
    leading = int((shares < ALPHA).sum()) + 1
    top_u, top_v = u[:, :leading], vh[:leading].T
    delta = delta - top_u @ (top_u.T @ delta)
    delta = delta - (delta @ top_v) @ top_v.T
    rest_u, rest_v = u[:, leading:rank], vh[leading:rank].T
    diagonal = ((rest_u.T @ delta) * rest_v.T).sum(dim=1)
    return delta - (rest_u * diagonal) @ rest_v.T


def swudi_factors(deltas: Deltas) -> LowRank:
    """Merge all three in closed form."""
    return solve([delta.double() for delta in deltas], FILTER)


def swudi_dense(deltas: Sequence[Tensor]) -> Tensor:
    """Compute the same from in × in matrices."""
    size = deltas[0].shape[1]
    gram, target = torch.zeros(size, size).to(deltas[0]), torch.zeros_like(deltas[0])
    for delta in deltas:
        within = delta.T @ delta / delta.square().sum()
        gram += within
        target += delta @ within
    gram.diagonal().add_(FILTER * largest_eigenvalue(lambda x: gram @ x, deltas))
    return torch.cholesky_solve(target.T, torch.linalg.cholesky(gram)).T


def largest_eigenvalue(apply_gram: Callable[[Tensor], Tensor], deltas: Sequence[Tensor]) -> float:
    """Return that of a Gram matrix, exactly: more random columns than its rank span its range."""
    size = deltas[0].shape[1]
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(size, min(size, 16 + MOST_RANK), generator=generator).to(deltas[0])
    basis, _ = torch.linalg.qr(apply_gram(start))
    return float(torch.linalg.eigvalsh(basis.T @ apply_gram(basis))[-1])


def swudi_residual(deltas: Deltas, found: LowRank) -> float:
    """Return ‖(τ (Σ ω ΔᵀΔ + εI) − Σ ω ΔΔᵀΔ) X‖ over ‖Σ ω ΔΔᵀΔ X‖ for 16 random columns X, in fp64.

    The error of τ is at most 1/`FILTER` times as large.
    """
    dense = [delta.double().dense() for delta in deltas]
    weights = [1 / float(delta.square().sum()) for delta in dense]
    generator = torch.Generator().manual_seed(1)
    columns = torch.randn(dense[0].shape[1], 16, generator=generator).double()

    def apply_gram(x: Tensor) -> Tensor:
        parts = [w * (d.T @ (d @ x)) for w, d in zip(weights, dense, strict=True)]
        return sum(parts[1:], parts[0])

    damping = FILTER * largest_eigenvalue(apply_gram, dense)
    targets = [w * (d @ (d.T @ (d @ columns))) for w, d in zip(weights, dense, strict=True)]
    target = sum(targets[1:], targets[0])
    result = found.double()
    image = result.left @ (result.right @ (apply_gram(columns) + damping * columns))
    return float((image - target).norm() / target.norm())


METHODS: Mapping[str, tuple[Callable[[Deltas], LowRank], Callable[[Sequence[Tensor]], Tensor]]] = {
    "slerp": (slerp_factors, slerp_dense),
    "opcm": (opcm_factors, opcm_dense),
    "swudi": (swudi_factors, swudi_dense),
}


def difference(found: LowRank, expected: Tensor) -> float:
    """Return the relative difference in the Frobenius norm."""
    dense = found.dense().to(expected)
    return float((dense - expected).norm() / expected.norm())


def timed(work: Callable[[], object], repeats: int) -> tuple[float, float, object]:
    """Return the shortest wall and CPU time of some repeats, and the last result.

    On a shared machine the CPU time is the one to compare.
    """
    wall = cpu = math.inf
    result: object = None
    for _ in range(repeats):
        started, used = time.perf_counter(), time.process_time()
        result = work()
        wall = min(wall, time.perf_counter() - started)
        cpu = min(cpu, time.process_time() - used)
    return wall, cpu, result


def main() -> None:
    """Measure, print a table, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=14336)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    rows = {}
    for name in arguments.methods:
        in_factors, in_dense = METHODS[name]
        small = random_deltas(arguments.outputs // 8, arguments.inputs // 8, arguments.rank // 8)
        equal = difference(in_factors(small), in_dense([delta.dense() for delta in small]))
        assert equal < 1e-6, (name, equal)
        doubles = random_deltas(arguments.outputs, arguments.inputs, arguments.rank)
        deltas = [LowRank(delta.left.float(), delta.right.float()) for delta in doubles]
        fast, fast_cpu, found = timed(lambda f=in_factors, d=deltas: f(d), 3)
        slow, slow_cpu, expected = timed(
            lambda f=in_dense, d=deltas: f([delta.dense() for delta in d]), 1
        )
        assert isinstance(found, LowRank)
        assert isinstance(expected, Tensor)
        rows[name] = {
            "shape": [arguments.outputs, arguments.inputs],
            "factors_seconds": fast,
            "dense_seconds": slow,
            "wall_ratio": slow / fast,
            "factors_cpu_seconds": fast_cpu,
            "dense_cpu_seconds": slow_cpu,
            "cpu_ratio": slow_cpu / fast_cpu,
            "difference_fp64_small": equal,
            "difference_fp32_full": difference(found, expected),
        }
        if name == "swudi":
            rows[name]["residual_fp64_full"] = swudi_residual(deltas, found)
        print(name, json.dumps(rows[name]), flush=True)
    facts = {
        "shape": [arguments.outputs, arguments.inputs],
        "rank": arguments.rank,
        "stages": 3,
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    previous = json.loads(RESULT.read_text())["methods"] if RESULT.exists() else {}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({**facts, "methods": previous | rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
