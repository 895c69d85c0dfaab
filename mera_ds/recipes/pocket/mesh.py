"""Surfaces of OBJ models as points."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def parse_obj(text: str) -> Floats:
    """Return the triangles (n, 3, 3) of a Wavefront OBJ file; polygons become fans."""
    vertices: list[list[float]] = []
    triangles: list[tuple[int, int, int]] = []
    for line in text.splitlines():
        kind, _, rest = line.strip().partition(" ")
        if kind == "v":
            vertices.append([float(value) for value in rest.split()[:3]])
        elif kind == "f":
            numbers = [int(corner.split("/")[0]) for corner in rest.split()]
            corners = [n - 1 if n > 0 else len(vertices) + n for n in numbers]
            triangles += [
                (corners[0], corners[k], corners[k + 1]) for k in range(1, len(corners) - 1)
            ]
    return np.array(vertices)[np.array(triangles)]


def sample_surface(triangles: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Return `count` points (count, 3), uniform over the area of the triangles."""
    first, second, third = triangles[:, 0], triangles[:, 1], triangles[:, 2]
    areas = np.linalg.norm(np.cross(second - first, third - first), axis=1)
    chosen = rng.choice(len(triangles), count, p=areas / areas.sum())
    root = np.sqrt(rng.random((count, 1)))
    along = rng.random((count, 1))
    return (
        (1 - root) * first[chosen]
        + root * (1 - along) * second[chosen]
        + root * along * third[chosen]
    )


def normalise(points: Floats) -> Floats:
    """Centre the bounding box at the origin and scale the farthest point to distance 1."""
    centred = points - (points.max(0) + points.min(0)) / 2
    return centred / np.linalg.norm(centred, axis=1).max()
