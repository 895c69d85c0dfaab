"""The merge itself: blocks of 2M elements, read from mapped files, merged, rounded and written.

θ_i = θ_{i−1} + λ (θ_tuned − θ_{i−1})  in fp32 (fp64 if fp32 is written), rounded once; with λ = 1/i
it is the average. Blocks are independent of each other, so that any number of threads gives the
same bytes; a thread's buffers are all the memory that it takes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mera_ds.errors import DataError
from mera_ds.merge.adapter import LowRank
from mera_ds.merge.convert import Converter, Floats
from mera_ds.merge.digest import BlockDigest
from mera_ds.merge.plan import MergedTensor
from mera_ds.merge.rule import Rule
from mera_ds.merge.safetensors_io import Bytes, MappedFiles, TensorPlace, item_size

if TYPE_CHECKING:
    from mera_ds.merge.whole import WholeTensors

Update = NDArray[np.float32]

SPAN = 1 << 18
"""Elements that go through all operations while they are in the processor's caches."""

SAMPLED = 4
"""The rounding error is measured in every fourth span where nothing but rounding can happen."""

_LARGEST = {"F16": 65504.0, "BF16": 3.38e38, "F32": 3.4e38, "F64": 1.79e308}
"""Of each dtype, at most: if a span's norm is below it, none of its elements becomes infinite."""

_GLANCE = 4096
"""Bytes or elements that are looked at first: most spans differ there if they differ at all."""

Write = Callable[[Bytes, int], None]
"""Takes bytes of the output tensor and where they begin, in bytes."""


@dataclass
class Squares:
    """Sums of squares, in the output's units."""

    update: float = 0.0
    """θ_i − θ_{i−1}."""
    weights: float = 0.0
    """θ_i."""
    sampled: float = 0.0
    """θ_i, where the rounding error was measured."""
    rounding: float = 0.0
    """Written weights − θ_i, there."""

    def add(self, other: "Squares") -> None:
        """Add those of another part."""
        self.update += other.update
        self.weights += other.weights
        self.sampled += other.sampled
        self.rounding += other.rounding


@dataclass(frozen=True)
class BlockResult:
    """What is known about a block once it is written."""

    changed: bool
    """Whether any of it was computed rather than copied."""
    squares: "Squares"
    """Of what was computed."""
    digests: tuple[bytes, bytes, bytes]
    """Fingerprints of the block in the previous model, the tuned one and the output."""


class BlockMerger:
    """Merges blocks of one plan; one per thread."""

    def __init__(self, files: MappedFiles, rule: Rule) -> None:
        self._files = files
        self._whole = _open_whole(files, rule, self._low_rank_rows)
        self._converter = Converter()
        self._buffers = {kind: _Buffers(kind) for kind in ("float32", "float64")}
        self._right: tuple[str, NDArray[np.float32]] = ("", np.zeros((0, 0), np.float32))
        self._factors, self._products = (_Growing(), _Growing()), _Growing()

    def merge(self, tensor: MergedTensor, begin: int, end: int, write: Write) -> BlockResult:
        """Merge the elements `begin` to `end` of a tensor, and write them.

        A span whose bytes are equal in both models is copied, so it keeps even the sign of a zero
        and whatever is not finite.

        Raises:
            DataError: if another element is not finite, or too large for the output's dtype.
        """
        with np.errstate(all="ignore"):  # what is not finite is looked for and refused
            update = None
            if tensor.base is not None and self._whole is not None:
                update = self._whole.update(tensor)[begin:end]
            elif isinstance(tensor.new, LowRank):
                weight = float(tensor.weight)
                update = self._low_rank_rows(tensor.name, tensor.new, begin, end, weight)
            return self._block(tensor, begin, end, update, write)

    def _block(
        self, tensor: MergedTensor, begin: int, end: int, update: Update | None, write: Write
    ) -> BlockResult:
        before, tuned, after = BlockDigest(), BlockDigest(), BlockDigest()
        squares, changed = Squares(), False
        for start in range(begin, end, SPAN):
            stop = min(start + SPAN, end)
            old = self._files.raw(tensor.old, start, stop)
            new = old
            if isinstance(tensor.new, TensorPlace):
                new = self._files.raw(tensor.new, start, stop)
            part = None if update is None else update[start - begin : stop - begin]
            merged = old
            if not _is_copied(tensor, old, new, part):
                sampled = (start - begin) % (SPAN * SAMPLED) == 0
                merged = self._span(tensor, old, new, part, sampled, squares)
                changed = True
            write(merged, start * item_size(tensor.dtype))
            before.add(old)
            after.add(merged)
            if new is not old:
                tuned.add(new)
        full = isinstance(tensor.new, TensorPlace)
        digests = (before.digest(), (tuned if full else before).digest(), after.digest())
        return BlockResult(changed, squares, digests)

    def _span(
        self,
        tensor: MergedTensor,
        old: Bytes,
        new: Bytes,
        update: Update | None,
        sampled: bool,
        squares: Squares,
    ) -> Bytes:
        """Return the merged bytes of a span: with an update, or between two models."""
        size = old.size // tensor.old.item_size
        buffers = self._buffers["float64" if tensor.dtype in ("F32", "F64") else "float32"]
        before, merged = buffers.floats(size)
        rounded = buffers.bytes(size * item_size(tensor.dtype))
        self._converter.widen(old, tensor.old.dtype, before)
        found = Squares()
        if update is not None:
            found.update = _squares(update)
            np.add(before, update, out=merged)
        elif isinstance(tensor.new, TensorPlace):
            self._converter.widen(new, tensor.new.dtype, merged)
            found.update = _lerp(before, merged, float(tensor.weight))
        else:
            np.copyto(merged, before)
        found.weights = _squares(merged)
        self._converter.narrow(merged, tensor.dtype, rounded)
        safe = found.weights**0.5 < _LARGEST[tensor.dtype]
        if sampled or not safe:
            self._converter.widen(rounded, tensor.dtype, before)
            np.subtract(before, merged, out=before)
            found.sampled, found.rounding = found.weights, _squares(before)
        total = found.update + found.weights + found.rounding
        if not (math.isfinite(total) or _is_finite(rounded, tensor.dtype)):
            raise DataError(_not_finite(tensor))
        squares.add(found)
        return rounded

    def _low_rank_rows(
        self, name: str, update: LowRank, begin: int, end: int, weight: float
    ) -> Update:
        """Return the elements `begin` to `end` of  weight · scale · B A, until the next call."""
        columns = update.shape[1]
        first, last = begin // columns, -(-end // columns)
        small, large = self._factors
        if update.transposed:
            left = self._matrix(update.factor_a, small, columns=(first, last)).T
        else:
            left = self._matrix(update.factor_b, small, rows=(first, last))
        if self._right[0] != name:
            whole = self._matrix(update.factor_b if update.transposed else update.factor_a, large)
            self._right = (name, whole.T if update.transposed else whole)
        rows = self._products.floats((last - first) * columns)
        scaled = left * (weight * update.scale)
        np.matmul(scaled, self._right[1], out=rows.reshape(last - first, columns))
        return rows[begin - first * columns : end - first * columns]

    def _matrix(
        self,
        place: TensorPlace,
        memory: "_Growing",
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
    ) -> NDArray[np.float32]:
        """Return some rows or columns of a factor in fp32, in memory that is used again."""
        first, last = rows or (0, place.shape[0])
        width = place.shape[1]
        raw = self._files.raw(place, first * width, last * width)
        if columns is not None:
            bounds = slice(columns[0] * place.item_size, columns[1] * place.item_size)
            raw = np.ascontiguousarray(raw.reshape(last - first, -1)[:, bounds]).reshape(-1)
        values = memory.floats(raw.size // place.item_size)
        self._converter.widen(raw, place.dtype, values)
        return values.reshape(last - first, -1)


class _Growing:
    """Memory of a thread that keeps the largest size that was needed."""

    def __init__(self) -> None:
        self._values = np.empty(0, np.float32)

    def floats(self, size: int) -> NDArray[np.float32]:
        if size > self._values.size:
            self._values = np.empty(size, np.float32)
        return self._values[:size]


class _Buffers:
    """A thread's memory: two spans of floats and one of the output."""

    def __init__(self, kind: str) -> None:
        self._floats: list[Floats] = [np.empty(SPAN, kind) for _ in range(2)]
        self._bytes = np.empty(8 * SPAN, np.uint8)

    def floats(self, size: int) -> tuple[Floats, Floats]:
        first, second = self._floats
        return first[:size], second[:size]

    def bytes(self, size: int) -> Bytes:
        return self._bytes[:size]


def _open_whole(files: MappedFiles, rule: Rule, product: Any) -> "WholeTensors | None":
    """Return what computes whole tensors, if the rule needs that; it imports torch."""
    if rule.combine is None:
        return None
    from mera_ds.merge.whole import WholeTensors

    return WholeTensors(files, rule, product)


def _is_copied(tensor: MergedTensor, old: Bytes, new: Bytes, update: Update | None) -> bool:
    if tensor.dtype != tensor.old.dtype:
        return False
    if update is not None:
        return not (update[:_GLANCE].any() or update.any())
    if tensor.new is None:
        return True
    assert isinstance(tensor.new, TensorPlace)
    if tensor.new.dtype != tensor.old.dtype or not np.array_equal(old[:_GLANCE], new[:_GLANCE]):
        return False
    return np.array_equal(old, new)


def _lerp(old: Floats, new: Floats, weight: float) -> float:
    """Make `new` old + w · (new − old); return the sum of squares of what was added."""
    if weight == 1.0:
        np.subtract(new, old, out=old)
        return _squares(old)
    np.subtract(new, old, out=new)
    squares = _squares(new) * weight**2
    np.multiply(new, weight, out=new)
    np.add(new, old, out=new)
    return squares


def _is_finite(written: Bytes, dtype: str) -> bool:
    values = np.empty(written.size // item_size(dtype), np.float64)
    Converter(fast=False).widen(written, dtype, values)
    return bool(np.isfinite(values).all())


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
