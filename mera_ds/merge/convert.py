"""Between half precision and fp32, without `import torch`: see `mera_ds.merge.libtorch`.

Where torch's library can't be loaded, numpy does it: the same bits, thirty times slower for fp16.
"""

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mera_ds.merge.libtorch import libtorch
from mera_ds.merge.safetensors_io import Bytes

Floats = NDArray[np.floating[Any]]

_HALVES = ("F16", "BF16")
_STORED: dict[str, Any] = {
    "F16": np.float16,
    "BF16": np.uint16,
    "F32": np.float32,
    "F64": np.float64,
}


class Converter:
    """Converts blocks; one per thread, since it keeps what it made for the thread's buffers."""

    def __init__(self, *, fast: bool = True) -> None:
        self._torch = libtorch() if fast else None
        self._kept: dict[tuple[int, int, str], ctypes.c_void_p] = {}
        if self._torch is not None:
            self._torch.omp_set_num_threads(1)

    def widen(self, raw: Bytes, dtype: str, out: Floats) -> None:
        """Convert a tensor's bytes to fp32 or fp64; exact, but for F64 to fp32.

        Args:
            raw: bytes of n elements of the dtype.
            dtype: F16, BF16, F32 or F64.
            out: (n,), a buffer that the thread uses again and again.
        """
        if self._torch is not None and dtype in _HALVES and out.dtype == np.float32:
            source = self._tensor(raw.ctypes.data, out.size, dtype)
            self._copy(self._kept_tensor(out, out.size, "F32"), source)
            self._torch.aoti_torch_delete_tensor_object(source)
        elif dtype == "BF16":
            bits = raw.view(np.uint16).astype(np.uint32) << np.uint32(16)
            np.copyto(out, bits.view(np.float32))
        else:
            np.copyto(out, raw.view(_STORED[dtype]), casting="same_kind")

    def narrow(self, values: Floats, dtype: str, out: Bytes) -> None:
        """Round to nearest, ties to even; what is too large becomes infinite.

        Args:
            values: (n,) fp32 or fp64, such a buffer.
            dtype: F16, BF16, F32 or F64.
            out: a buffer of the bytes of n elements of the dtype.
        """
        if self._torch is not None and dtype in _HALVES and values.dtype == np.float32:
            target = self._kept_tensor(out, values.size, dtype)
            self._copy(target, self._kept_tensor(values, values.size, "F32"))
        elif dtype == "BF16":
            bits = values.astype(np.float32, copy=False).view(np.uint32)
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
            np.copyto(out.view(np.uint16), rounded, casting="unsafe")
        else:
            with np.errstate(over="ignore"):
                np.copyto(out.view(_STORED[dtype]), values, casting="same_kind")

    def _copy(self, target: ctypes.c_void_p, source: ctypes.c_void_p) -> None:
        assert self._torch is not None
        if self._torch.aoti_torch_copy_(target, source, 0) != 0:
            raise RuntimeError("torch's library refused to convert a block")

    def _kept_tensor(self, array: NDArray[Any], size: int, dtype: str) -> ctypes.c_void_p:
        key = (array.ctypes.data, size, dtype)
        if key not in self._kept:
            self._kept[key] = self._tensor(*key)
        return self._kept[key]

    def _tensor(self, address: int, size: int, dtype: str) -> ctypes.c_void_p:
        """Return a handle of a one-dimensional tensor at an address."""
        assert self._torch is not None
        handle = ctypes.c_void_p()
        failed = self._torch.aoti_torch_create_tensor_from_blob(
            address, 1, _one(size), _one(1), 0, _codes()[dtype], 0, -1, ctypes.byref(handle)
        )
        if failed:
            raise RuntimeError("torch's library refused a block")
        return handle


@cache
def _one(value: int) -> "ctypes.Array[ctypes.c_int64]":
    """Return the shape or stride of one dimension."""
    return (ctypes.c_int64 * 1)(value)


@cache
def _codes() -> dict[str, int]:
    """Return torch's number of each dtype."""
    library = libtorch()
    assert library is not None
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    return {key: getattr(library, f"aoti_torch_dtype_{name}")() for key, name in names.items()}
