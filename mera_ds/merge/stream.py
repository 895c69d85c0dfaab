"""The merge itself: blocks of 2M elements, read from mapped files, averaged, rounded and written.

θ_i = (i−1)/i · θ_{i−1} + 1/i · θ_tuned  in fp32 (fp64 if fp32 is written), rounded once. Blocks are
independent of each other, so that any number of threads gives the same bytes; a thread's buffers
are all the memory that it takes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mera_ds.errors import DataError
from mera_ds.merge.adapter import LowRank
from mera_ds.merge.convert import Converter, Floats
from mera_ds.merge.digest import BlockDigest
from mera_ds.merge.plan import MergedTensor
from mera_ds.merge.safetensors_io import Bytes, MappedFiles, TensorPlace, item_size

SPAN = 1 << 16
"""Elements that go through all operations while they are in the processor's cache."""

Write = Callable[[Bytes, int], None]
"""Takes bytes of the output tensor and where they begin, in bytes."""


@dataclass(frozen=True)
class BlockResult:
    """What is known about a block once it is written."""

    changed: bool
    """Whether any of it was computed rather than copied."""
    squares: tuple[float, float, float]
    """Sums over what was computed: merged weights², update², rounding error²."""
    digests: tuple[bytes, bytes, bytes]
    """Fingerprints of the block in the previous model, the tuned one and the output."""


class BlockMerger:
    """Merges blocks of one plan; one per thread."""

    def __init__(self, files: MappedFiles, weight: float) -> None:
        self._files = files
        self._weight = weight
        self._converter = Converter()
        self._buffers = {kind: _Buffers(kind) for kind in ("float32", "float64")}
        self._right: tuple[str, NDArray[np.float32]] = ("", np.zeros((0, 0), np.float32))
        self._update = np.zeros(0, np.float32)

    def merge(self, tensor: MergedTensor, begin: int, end: int, write: Write) -> BlockResult:
        """Merge the elements `begin` to `end` of a tensor, and write them.

        A span whose bytes are equal in both models is copied, so it keeps even the sign of a zero
        and whatever is not finite.

        Raises:
            DataError: if another element is not finite, or too large for the output's dtype.
        """
        if isinstance(tensor.new, LowRank):
            self._update = self._low_rank_rows(tensor.name, tensor.new, begin, end)
        digests = (BlockDigest(), BlockDigest(), BlockDigest())
        squares, changed = np.zeros(3), False
        for start in range(begin, end, SPAN):
            stop = min(start + SPAN, end)
            old = self._files.raw(tensor.old, start, stop)
            new = old
            if isinstance(tensor.new, TensorPlace):
                new = self._files.raw(tensor.new, start, stop)
            merged = old
            if not _is_copied(tensor, old, new):
                merged, found = self._span(tensor, old, new, start - begin)
                squares += found
                changed = True
            write(merged, start * item_size(tensor.dtype))
            for digest, piece in zip(digests, (old, new, merged), strict=True):
                digest.add(piece)
        first, second, third = (digest.digest() for digest in digests)
        weights, update, error = (float(value) for value in squares)
        return BlockResult(changed, (weights, update, error), (first, second, third))

    def _span(
        self, tensor: MergedTensor, old: Bytes, new: Bytes, offset: int
    ) -> tuple[Bytes, tuple[float, float, float]]:
        """Return the merged bytes of a span, `offset` elements into its block, and the squares."""
        size = old.size // tensor.old.item_size
        buffers = self._buffers["float64" if tensor.dtype in ("F32", "F64") else "float32"]
        before, merged, third = buffers.floats(size)
        rounded = buffers.bytes(size * item_size(tensor.dtype))
        self._converter.widen(old, tensor.old.dtype, before)
        if isinstance(tensor.new, LowRank):
            np.add(before, self._update[offset : offset + size], out=merged)
        elif tensor.new is None:
            np.copyto(merged, before)
        else:
            self._converter.widen(new, tensor.new.dtype, third)
            _average(before, third, self._weight, merged)
        self._converter.narrow(merged, tensor.dtype, rounded)
        self._converter.widen(rounded, tensor.dtype, third)
        np.subtract(third, merged, out=third)
        np.subtract(merged, before, out=before)
        squares = (_squares(merged), _squares(before), _squares(third))
        if not math.isfinite(sum(squares)) and not np.isfinite(third).all():
            raise DataError(_not_finite(tensor))
        return rounded, squares

    def _low_rank_rows(
        self, name: str, update: LowRank, begin: int, end: int
    ) -> NDArray[np.float32]:
        """Return the elements `begin` to `end` of  weight · scale · B A."""
        columns = update.shape[1]
        first, last = begin // columns, -(-end // columns)
        if update.transposed:
            left = self._matrix(update.factor_a, columns=(first, last)).T
        else:
            left = self._matrix(update.factor_b, rows=(first, last))
        if self._right[0] != name:
            right = update.factor_b if update.transposed else update.factor_a
            whole = self._matrix(right)
            self._right = (name, whole.T if update.transposed else whole)
        rows = (left * np.float32(self._weight * update.scale)) @ self._right[1]
        return rows.reshape(-1)[begin - first * columns : end - first * columns]

    def _matrix(
        self,
        place: TensorPlace,
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
    ) -> NDArray[np.float32]:
        """Return some rows or columns of a factor in fp32."""
        first, last = rows or (0, place.shape[0])
        width = place.shape[1]
        raw = self._files.raw(place, first * width, last * width)
        if columns is not None:
            bounds = slice(columns[0] * place.item_size, columns[1] * place.item_size)
            raw = np.ascontiguousarray(raw.reshape(last - first, -1)[:, bounds]).reshape(-1)
        values = np.empty(raw.size // place.item_size, np.float32)
        Converter(fast=False).widen(raw, place.dtype, values)
        return values.reshape(last - first, -1)


class _Buffers:
    """A thread's memory: three spans of floats and one of the output."""

    def __init__(self, kind: str) -> None:
        self._floats: list[Floats] = [np.empty(SPAN, kind) for _ in range(3)]
        self._bytes = np.empty(8 * SPAN, np.uint8)

    def floats(self, size: int) -> tuple[Floats, Floats, Floats]:
        first, second, third = self._floats
        return first[:size], second[:size], third[:size]

    def bytes(self, size: int) -> Bytes:
        return self._bytes[:size]


def _is_copied(tensor: MergedTensor, old: Bytes, new: Bytes) -> bool:
    if tensor.dtype != tensor.old.dtype or isinstance(tensor.new, LowRank):
        return False
    if tensor.new is None:
        return True
    return tensor.new.dtype == tensor.old.dtype and np.array_equal(old, new)


def _average(old: Floats, new: Floats, weight: float, out: Floats) -> None:
    """Write (1−w) · old + w · new into `out`; `new` is used up."""
    if weight == 1.0:
        np.copyto(out, new)
        return
    np.multiply(old, 1.0 - weight, out=out)
    np.multiply(new, weight, out=new)
    np.add(out, new, out=out)


def _squares(values: Floats) -> float:
    return float(np.vdot(values, values))


def _not_finite(tensor: MergedTensor) -> str:
    places = [tensor.old]
    if isinstance(tensor.new, TensorPlace):
        places.append(tensor.new)
    elif tensor.new is not None:
        places.append(tensor.new.factor_a)
    files = " and ".join(str(place.file) for place in places)
    return (
        f"the merge of '{tensor.name}' is not finite in {tensor.dtype}; look at {files}, and if "
        "they are finite choose another --dtype"
    )
