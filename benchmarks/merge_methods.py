"""Merge methods on factors against the same on dense matrices, at the size of a Llama-3-8B layer.

    python benchmarks/merge_methods.py [--outputs 4096 --inputs 14336 --rank 128]

Three stages' deltas of one layer are merged by the methods that act on low-rank deltas, once in
factor space (fp64) and once by the dense computation of the same equation (fp32, as anybody would
do it; building the matrices from the factors is part of it).
Equality is asserted in fp64 at an eighth of the size (relative difference below 1e-6) before
anything is timed; at full size the fp32 difference is reported. The result is written to
benchmarks/results/merge_methods.json.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mera_ds.merge.factors import LowRank, total
from mera_ds.merge.methods.opcm import project
from mera_ds.merge.methods.slerp import interpolate
from mera_ds.merge.methods.swudi import solve

RESULT = Path(__file__).parent / "results" / "merge_methods.json"
ALPHA, FILTER = 0.5, 1e-3

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
    first, second = interpolate(deltas, [1.0, 1.0], 1 / 3)
    return total([*(delta * (first + second) for delta in deltas[:2]), deltas[2] * second])


def slerp_dense(deltas: Sequence[Tensor]) -> Tensor:
    """Compute the same on dense matrices."""
    before = deltas[0] + deltas[1]
    after = before + deltas[2]
    angle = math.acos(float((before * after).sum() / before.norm() / after.norm()))
    first, second = (math.sin(t * angle) / math.sin(angle) for t in (2 / 3, 1 / 3))
    return first * before + second * after


def opcm_factors(deltas: Deltas) -> LowRank:
    """Project the third delta against the first two."""
    return project(deltas[2], total(deltas[:2]), ALPHA)


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
    return solve(deltas, FILTER)


def swudi_dense(deltas: Sequence[Tensor]) -> Tensor:
    """Compute the same from in × in matrices; the largest eigenvalue by power iteration."""
    size = deltas[0].shape[1]
    gram, target = torch.zeros(size, size).to(deltas[0]), torch.zeros_like(deltas[0])
    for delta in deltas:
        within = delta.T @ delta / delta.square().sum()
        gram += within
        target += delta @ within
    vector = torch.ones(size).to(gram)
    for _ in range(300):
        vector = gram @ vector
        vector /= vector.norm()
    gram.diagonal().add_(FILTER * float(vector @ gram @ vector))
    return torch.cholesky_solve(target.T, torch.linalg.cholesky(gram)).T


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
        deltas = random_deltas(arguments.outputs, arguments.inputs, arguments.rank)
        single = [LowRank(delta.left.float(), delta.right.float()) for delta in deltas]
        fast, fast_cpu, found = timed(lambda f=in_factors, d=deltas: f(d), 3)
        slow, slow_cpu, expected = timed(
            lambda f=in_dense, d=single: f([delta.dense() for delta in d]), 1
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
        print(name, json.dumps(rows[name]), flush=True)
    facts = {
        "shape": [arguments.outputs, arguments.inputs],
        "rank": arguments.rank,
        "stages": 3,
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }
    previous = json.loads(RESULT.read_text())["methods"] if RESULT.exists() else {}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({**facts, "methods": previous | rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
