"""Point clouds: arrays of x, y, z and perhaps r, g, b in numpy's file format."""

import io
import math
import tokenize
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mera_ds.media.errors import Unusable

MAX_POINTS = 1_000_000

_BROKEN_NPY = (
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    EOFError,
    RecursionError,
    MemoryError,
    tokenize.TokenError,
)
"""What numpy's reader raises on damaged files: the header is a Python literal."""


def decode_points(content: bytes, extension: str) -> NDArray[np.float32]:
    """Return a point cloud (N, 3) or (N, 6); the extension isn't used."""
    try:
        _require_npy_size(content)
        points = np.load(io.BytesIO(content), allow_pickle=False)
        with np.errstate(over="ignore"):  # what overflows becomes infinite, which is refused below
            cloud = np.ascontiguousarray(points, dtype=np.float32)
    except _BROKEN_NPY as error:
        raise Unusable(f"{type(error).__name__}: {error}") from None
    if cloud.ndim != 2 or cloud.shape[1] not in (3, 6) or not len(cloud):
        raise Unusable(f"its shape is {points.shape}; expected (N, 3) or (N, 6) with N > 0")
    if len(cloud) > MAX_POINTS:
        raise Unusable(f"it has {len(cloud)} points, more than {MAX_POINTS}")
    if not np.isfinite(cloud).all():
        raise Unusable("it has values that are not finite")
    return cloud


def _require_npy_size(content: bytes) -> None:
    """Compare the size that an npy header claims with what is there, before it is allocated."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read_header: Callable[[io.BytesIO], Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version, np.lib.format.read_array_header_2_0)
    shape, _, dtype = read_header(stream)
    claimed, present = math.prod(shape) * dtype.itemsize, len(content) - stream.tell()
    if claimed != present:
        raise Unusable(f"its header claims {claimed} bytes and {present} are there")
