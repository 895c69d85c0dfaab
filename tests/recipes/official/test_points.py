"""Point clouds of the three forms, and what is no point cloud."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mera_ds.media.errors import Unusable
from mera_ds.recipes.official.points import convert_points, read_ply

from ..sources import POINTS, cloud, npy_bytes, ply_bytes, pt_bytes


def convert(content: bytes, extension: str, count: int = POINTS) -> NDArray[np.float32]:
    """Return the stored points, as they are in the source otherwise."""
    stored = convert_points(content, extension, count, normalise=False, name="x")
    points = np.load(io.BytesIO(stored), allow_pickle=False)
    assert points.dtype == np.float32
    return points


def tensor(points: NDArray[np.float32]) -> bytes:
    return pt_bytes(torch.from_numpy(points.T.copy()))


def scaled() -> NDArray[np.float32]:
    points = cloud(1)
    points[:, 3:] /= 255
    return points


@pytest.mark.parametrize(
    ("content", "extension"),
    [
        (lambda: tensor(cloud(1)), "pt"),
        (lambda: tensor(cloud(1).astype(np.float64)), "pt"),
        (lambda: tensor(scaled()), "pt"),
        (lambda: ply_bytes(cloud(1)), "ply"),
        (lambda: npy_bytes(cloud(1)), "npy"),
    ],
)
def test_all_forms_give_the_same_points(content: Callable[[], bytes], extension: str) -> None:
    np.testing.assert_allclose(convert(content(), extension), scaled(), atol=1e-5)


def test_drawn_points_depend_on_the_name_alone() -> None:
    content = npy_bytes(cloud(1))
    first = convert_points(content, "npy", 16, False, "0/a")
    assert first == convert_points(content, "npy", 16, False, "0/a")
    assert first != convert_points(content, "npy", 16, False, "0/b")
    kept = np.load(io.BytesIO(first), allow_pickle=False)
    assert {tuple(p) for p in kept} <= {tuple(p) for p in scaled()}
    assert len({tuple(p) for p in kept}) == 16


def test_ply_with_other_columns() -> None:
    text = (
        b"ply\r\nformat ascii 1.0\r\nelement vertex 1\r\nproperty float red\r\nproperty float z\r\n"
    )
    text += b"property float green\r\nproperty float blue\r\nproperty float y\r\n"
    text += b"property float x\r\nproperty float nx\r\nend_header\r\n0.5 3 0.25 1 2 1 9\r\n"
    np.testing.assert_array_equal(read_ply(text), [[1, 2, 3, 0.5, 0.25, 1]])


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_code_in_a_tensor_file_is_not_executed(tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    for content in (pt_bytes(Canary(canary)), pickle.dumps(Canary(canary))):
        with pytest.raises(Unusable):
            convert(content, "pt")
        with pytest.raises(Unusable):
            convert(content, "npy")
    assert not canary.exists()


PLY = ply_bytes(cloud(1))


@pytest.mark.parametrize(
    ("content", "extension", "complaint"),
    [
        (b"", "pt", "Error"),
        (tensor(cloud(1))[:-200], "pt", "Error"),
        (pt_bytes({"a": torch.zeros(2)}), "pt", "holds a dict"),
        (pt_bytes(torch.zeros(3, POINTS)), "pt", r"\(3, 64\)"),
        (pt_bytes(torch.zeros(1).expand(6, 10**9)), "pt", "too large"),
        (tensor(cloud(1) + 1), "pt", "of full brightness"),
        (tensor(cloud(1)[:9]), "pt", "it has 9 points"),
        (tensor(np.full((POINTS, 6), np.nan, np.float32)), "pt", "not finite"),
        (b"solid", "ply", "no PLY file"),
        (PLY.replace(b"ascii", b"binary_little_endian"), "ply", "binary"),
        (PLY.replace(b"property uchar blue\n", b""), "ply", "no blue"),
        (PLY.replace(b"vertex 64", b"vertex 99999999999"), "ply", "announces 99999999999"),
        (PLY.replace(b"vertex 64", b"vertex -4"), "ply", "announces 0"),
        (PLY[:900], "ply", "ends before"),
        (PLY.replace(b"end_header\n", b"end_header\nx "), "ply", "could not convert"),
        (npy_bytes(cloud(1)[:, :5]), "npy", "shape"),
        (b"", "obj", "not from 'obj'"),
    ],
)
def test_others_are_unusable(content: bytes, extension: str, complaint: str) -> None:
    with pytest.raises(Unusable, match=complaint):
        convert(content, extension)
