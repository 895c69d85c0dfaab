"""Merge methods that must see a whole tensor at once: its inner products, or its largest entries.

The result is handed to the stream as an update of the previous model, in fp32; so blocks, report,
digests and continuing are those of the average. Memory is some fp32 copies of one tensor per
thread, whatever the size of the model.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from mera_ds.merge.adapter import LowRank
from mera_ds.merge.convert import Converter
from mera_ds.merge.plan import MergedTensor
from mera_ds.merge.rule import Rule
from mera_ds.merge.safetensors_io import MappedFiles, TensorPlace

_PIECE = 1 << 20
"""Elements that are converted at once."""

Product = Callable[[str, LowRank, int, int, float], NDArray[np.float32]]
"""Returns some elements of a low-rank update, times a number."""


class WholeTensors:
    """Computes the update of one tensor after the other; one per thread."""

    def __init__(self, files: MappedFiles, rule: Rule, product: Product) -> None:
        self._files = files
        self._rule = rule
        self._product = product
        self._converter = Converter()
        self._kept: tuple[str, NDArray[np.float32]] = ("", np.zeros(0, np.float32))
        self._memory = [np.zeros(0, np.float32) for _ in range(3)]

    def update(self, tensor: MergedTensor) -> NDArray[np.float32]:
        """Return  θ_i − θ_{i−1}  of a tensor, flattened."""
        if self._kept[0] != tensor.name:
            self._kept = (tensor.name, self._compute(tensor))
        return self._kept[1]

    def _compute(self, tensor: MergedTensor) -> NDArray[np.float32]:
        assert tensor.base is not None
        assert self._rule.combine is not None
        before = self._values(0, tensor.old)
        older = self._values(1, tensor.base)
        np.subtract(before, older, out=older)
        if isinstance(tensor.new, TensorPlace):
            newest = self._values(2, tensor.new)
            np.subtract(newest, before, out=newest)
        elif tensor.new is not None:
            newest = self._product(tensor.name, tensor.new, 0, tensor.old.elements, 1.0)
        else:
            newest = np.zeros_like(before)
        shape = tensor.old.shape
        deltas = [torch.from_numpy(entry).reshape(shape) for entry in (older, newest)]
        found = self._rule.combine(tensor.layer, deltas).flatten().numpy()
        return np.subtract(found, older, out=before)

    def _values(self, slot: int, place: TensorPlace) -> NDArray[np.float32]:
        """Return a tensor in fp32, in memory that is used again."""
        size = place.elements
        if self._memory[slot].size < size:
            self._memory[slot] = np.empty(size, np.float32)
        values = self._memory[slot][:size]
        for begin in range(0, size, _PIECE):
            end = min(begin + _PIECE, size)
            raw = self._files.raw(place, begin, end)
            self._converter.widen(raw, place.dtype, values[begin:end])
        return values
