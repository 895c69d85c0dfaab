"""Coloured point clouds of Objaverse models, as Cap3D and PointLLM distribute them."""

import hashlib
import io

import numpy as np
from numpy.typing import NDArray

from mera_ds.media.errors import Unusable
from mera_ds.media.points import MAX_POINTS, decode_points

COLOUR_SCALE = 255.0
_PLY_COLUMNS = ("x", "y", "z", "red", "green", "blue")
_PLY_INTEGERS = ("char", "uchar", "int8", "uint8", "short", "ushort", "int16", "uint16")


def convert_points(content: bytes, extension: str, count: int, normalise: bool, name: str) -> bytes:
    """Return an npy file of float32 (count, 6): x, y, z and r, g, b in [0, 1].

    Args:
        content: a Cap3D tensor (6, n) with colours to 255 (`pt`), an ASCII `ply`, or PointLLM's
            array (n, 6) with colours to 1 (`npy`).
        extension: which of them it is.
        count: how many points are kept, drawn at random without repetition.
        normalise: move the centroid to the origin and the farthest point to distance 1.
        name: seed of the draw.

    Raises:
        Unusable: it is damaged, has fewer points, or values outside of their range.
    """
    if extension == "pt":
        cloud = _read_pt(content)
    elif extension == "ply":
        cloud = read_ply(content)
    elif extension == "npy":
        cloud = decode_points(content, extension)
    else:
        raise Unusable(f"point clouds are read from pt, ply and npy, not from '{extension}'")
    _require_coloured(cloud, count)
    if len(cloud) > count:
        cloud = cloud[_draw_points(len(cloud), count, name)]
    if normalise:
        centred = cloud[:, :3] - cloud[:, :3].mean(axis=0, dtype=np.float64)
        radius = max(float(np.linalg.norm(centred, axis=1).max()), 1e-9)
        cloud = np.hstack([centred / radius, cloud[:, 3:]])
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(cloud, dtype=np.float32), allow_pickle=False)
    return buffer.getvalue()


def _draw_points(total: int, count: int, name: str) -> NDArray[np.int64]:
    """Return `count` of `total` indices in order; RandomState's stream never changes in numpy."""
    digest = hashlib.sha256(name.encode()).digest()
    order = np.random.RandomState(int.from_bytes(digest[:4], "big")).permutation(total)
    return np.sort(order[:count])


def _require_coloured(cloud: NDArray[np.float32], count: int) -> None:
    if cloud.ndim != 2 or cloud.shape[1] != 6:
        raise Unusable(f"its shape is {cloud.shape}; expected points with x, y, z, r, g, b")
    if not count <= len(cloud) <= MAX_POINTS:
        raise Unusable(f"it has {len(cloud)} points, allowed: {count} to {MAX_POINTS}")
    if not np.isfinite(cloud).all():
        raise Unusable("it has values that are not finite")
    lowest, highest = float(cloud[:, 3:].min()), float(cloud[:, 3:].max())
    if lowest < 0 or highest > 1:
        raise Unusable(f"its colours go from {lowest:g} to {highest:g} of full brightness")


def _read_pt(content: bytes) -> NDArray[np.float32]:
    from mera_ds.recipes.torch_files import load_tensor  # it needs torch, the others don't

    tensor = load_tensor(content)
    if tensor.ndim != 2 or tensor.shape[0] != 6:
        raise Unusable(f"its shape is {tensor.shape}; expected (6, points)")
    cloud = np.array(tensor.T, dtype=np.float32)
    colours = cloud[:, 3:]
    if not (colours.max() <= 1 and (colours % 1).any()):  # fractions up to 1 are scaled already
        colours /= COLOUR_SCALE
    return cloud


def read_ply(content: bytes) -> NDArray[np.float32]:
    """Return the vertices (n, 6) of an ASCII PLY file, colours in [0, 1].

    Raises:
        Unusable: it isn't such a file, or is cut.
    """
    header, found, body = content.partition(b"end_header")
    lines = header.decode("ascii", errors="replace").splitlines()
    if not found or not lines or lines[0].strip() != "ply":
        raise Unusable("it is no PLY file")
    if not any(line.split()[:2] == ["format", "ascii"] for line in lines):
        raise Unusable("it is a binary PLY file; only ASCII ones are read")
    count, columns = _ply_vertices(lines)
    if missing := [name for name in _PLY_COLUMNS if name not in columns]:
        raise Unusable(f"its vertices have no {', '.join(missing)}")
    values = body.split(maxsplit=count * len(columns))[: count * len(columns)]
    if len(values) < count * len(columns):
        raise Unusable(f"it ends before its {count} vertices do")
    try:
        table = np.array(values, dtype=np.float64).reshape(count, len(columns))
    except ValueError as error:
        raise Unusable(str(error)) from None
    names = list(columns)
    cloud = table[:, [names.index(name) for name in _PLY_COLUMNS]]
    if columns["red"] in _PLY_INTEGERS:
        cloud[:, 3:] /= COLOUR_SCALE
    return cloud.astype(np.float32)


def _ply_vertices(header: list[str]) -> tuple[int, dict[str, str]]:
    """Return how many vertices a header announces, and the type of each of their columns."""
    count, columns, inside, element = 0, {}, False, 0
    for words in (line.split() for line in header):
        if words[:1] == ["element"] and len(words) == 3:
            inside, element = words[1] == "vertex", element + 1
            if inside and element > 1:
                raise Unusable("its vertices are not its first element")
            if inside:
                count = int(words[2]) if words[2].isdigit() else 0
        elif words[:1] == ["property"] and inside and len(words) == 3:
            columns[words[2]] = words[1]
    if not 0 < count <= MAX_POINTS:
        raise Unusable(f"its header announces {count} vertices, allowed: 1 to {MAX_POINTS}")
    return count, columns
