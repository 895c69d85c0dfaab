"""What a merge can't be faster than on a machine, and how many bytes a delta takes."""

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from merge_inputs import RANK, STAGE, Llama, write_config
from safetensors.numpy import save_file

from mera_ds.merge.safetensors_io import MappedFiles
from mera_ds.merge.state_dicts import prepare_merge
from mera_ds.merge.stream import SPAN, BlockMerger

WIDTH, INNER, KEYS, VOCABULARY, BLOCKS = 4096, 14336, 1024, 128256, 32
"""Llama-3-8B; its head is not tied to its embeddings."""
LINEAR = (
    *((WIDTH, WIDTH), (KEYS, WIDTH), (KEYS, WIDTH), (WIDTH, WIDTH)),
    *((INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)),
)
"""The linear layers of one of its blocks."""
THREADS = 2


def delta_bytes() -> dict[str, float]:
    """Return bytes of Llama-3-8B in fp16, and of a stage's factors at rank 128, in GB."""
    block = sum(rows * columns for rows, columns in LINEAR) + 2 * WIDTH
    model = BLOCKS * block + 2 * VOCABULARY * WIDTH + WIDTH
    factors = BLOCKS * RANK * sum(rows + columns for rows, columns in LINEAR)
    return {"model_fp16": 2e-9 * model, "fp32": 4e-9 * factors, "fp16": 2e-9 * factors}


def seconds_of(work: Callable[[], object], least: float = 0.5) -> float:
    """Return the shortest time of a call, among as many as fit into half a second."""
    best, end = float("inf"), time.perf_counter() + least
    while time.perf_counter() < end:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def in_cache_nanoseconds(work: Path) -> float:
    """Return the time per element of one thread that merges a span again and again, in cache."""
    generator = np.random.default_rng(0)
    for name in "AB":
        write_config(work / name, Llama(64, 1))
        values = (0.02 * generator.standard_normal(SPAN)).astype(np.float16)
        save_file({"w": values}, work / name / "model.safetensors")
    plan = prepare_merge(work / "A", work / "B", STAGE, work / "C")
    files = MappedFiles(place.file for places in plan.inputs for place in places.values())
    merger, (tensor,) = BlockMerger(files, plan.rule), plan.tensors
    found = seconds_of(lambda: merger.merge(tensor, 0, SPAN, lambda content, offset: None))
    shutil.rmtree(work)
    return 1e9 * found / SPAN


def product_rate() -> float:
    """Return the flops per second of  B A  for a block of rows, on all threads."""
    left = np.ones((1024, RANK), np.float32)
    right, out = np.ones((RANK, 2048), np.float32), np.empty((1024, 2048), np.float32)
    return 2 * out.size * RANK / seconds_of(lambda: np.matmul(left, right, out=out))


def limits(work: Path, llama: Llama, table: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return seconds that a merge takes at least, by what takes them, and what it took.

    Reading and writing at the speed of the plain copy; arithmetic at its speed on one span that
    stays in the cache; the products of factors at the speed of the BLAS.
    """
    elements = sum(int(np.prod(shape)) for shape in llama.shapes.values())
    changed = llama.layers * sum(rows * columns for rows, columns in llama.linear.values())
    copy = table["copy, 2 threads"]["core_s"]
    arithmetic = 1e-9 * in_cache_nanoseconds(work / "span") / THREADS
    start = table["ours, dry run"]["wall_s"]
    return {
        "ours": {
            "start and checks": start,
            "bytes (1.5 copies: two models read, one written)": 1.5 * copy,
            "arithmetic": elements * arithmetic,
            "measured": table["ours"]["wall_s"],
        },
        "ours, base + adapter": {
            "start and checks": start,
            "bytes (1 copy)": copy,
            "arithmetic": changed * arithmetic,
            "products B A": 2 * RANK * changed / product_rate(),
            "measured": table["ours, base + adapter"]["wall_s"],
        },
    }
