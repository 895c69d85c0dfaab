"""Conversion of half precision: torch's library and numpy give the bits that torch gives."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mera_ds.merge.convert import Converter
from mera_ds.merge.libtorch import libtorch

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16}
EVERY_HALF = np.arange(65536, dtype=np.uint16).view(np.uint8)


def difficult_floats(dtype: str) -> NDArray[np.float32]:
    """Return every half, all midpoints between two, their neighbours, and bits by chance."""
    halves = torch.from_numpy(EVERY_HALF.copy()).view(TORCH[dtype]).float().numpy()
    finite = np.sort(halves[np.isfinite(halves)])
    middle = ((finite[:-1].astype(np.float64) + finite[1:]) / 2).astype(np.float32)
    bits = np.random.default_rng(0).integers(0, 2**32, 50_000, dtype=np.uint32).view(np.float32)
    values = [finite, middle, np.nextafter(middle, np.inf, dtype=np.float32)]
    return np.concatenate([*values, bits[np.isfinite(bits)]])


def test_the_fast_way_is_there() -> None:
    assert libtorch() is not None


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("fast", [True, False])
class TestHalves:
    def test_widening_is_that_of_torch(self, dtype: str, fast: bool) -> None:
        found = np.empty(65536, np.float32)
        Converter(fast=fast).widen(EVERY_HALF, dtype, found)
        expected = torch.from_numpy(EVERY_HALF.copy()).view(TORCH[dtype]).float().numpy()
        assert np.array_equal(found, expected, equal_nan=True)
        assert np.array_equal(np.signbit(found), np.signbit(expected))

    def test_narrowing_is_that_of_torch(self, dtype: str, fast: bool) -> None:
        values = difficult_floats(dtype)
        found = np.empty(2 * values.size, np.uint8)
        Converter(fast=fast).narrow(values, dtype, found)
        expected = torch.from_numpy(values).to(TORCH[dtype]).view(torch.int16).numpy()
        assert np.array_equal(found.view(np.int16), expected)


@pytest.mark.parametrize(("dtype", "kind"), [("F32", np.float32), ("F64", np.float64)])
@pytest.mark.parametrize("working", [np.float32, np.float64])
def test_wider_dtypes(dtype: str, kind: type, working: type) -> None:
    values = np.random.default_rng(1).standard_normal(1000).astype(working)
    raw = np.empty(1000 * np.dtype(kind).itemsize, np.uint8)
    Converter().narrow(values, dtype, raw)
    assert np.array_equal(raw.view(kind), values.astype(kind))
    back = np.empty(1000, working)
    Converter().widen(raw, dtype, back)
    assert np.array_equal(back, values.astype(kind).astype(working))


def test_buffers_may_be_used_again() -> None:
    """The kept handles follow the buffers' content and differ by length."""
    converter, buffer = Converter(), np.empty(100, np.float32)
    for size in (100, 7, 100, 33):
        values = np.random.default_rng(size).standard_normal(size).astype(np.float16)
        converter.widen(values.view(np.uint8), "F16", buffer[:size])
        assert np.array_equal(buffer[:size], values.astype(np.float32))
