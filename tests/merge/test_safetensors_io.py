"""Headers are read and written as the safetensors library does it; damage is named."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mera_ds.errors import DataError, InputError
from mera_ds.merge.safetensors_io import (
    INDEX,
    MappedFiles,
    header_bytes,
    read_header,
    tensor_places,
)

from .models import base_model, checkpoint

TENSORS = {
    "half": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "brain": torch.arange(5, dtype=torch.bfloat16),
    "single": torch.tensor(7.0),
    "whole": torch.arange(3),
    "truth": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4),
}


def with_header(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_places_and_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    places = read_header(tmp_path / "x.safetensors")
    files = MappedFiles([tmp_path / "x.safetensors"])
    assert places.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert places[name].shape == tuple(tensor.shape)
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy() if tensor.numel() else ()
        assert np.array_equal(files.raw(places[name]), raw)
    assert files.raw(places["half"], 1, 3).view(np.float16).tolist() == [1.0, 2.0]


def test_the_library_reads_our_header(tmp_path: Path) -> None:
    header = header_bytes([("ß", "F32", (2, 2)), ("b", "BF16", (3,)), ("none", "F16", (0,))])
    assert len(header) % 8 == 0
    (tmp_path / "x.safetensors").write_bytes(header + bytes(16 + 6))
    with safe_open(str(tmp_path / "x.safetensors"), framework="pt") as file:
        assert {name: file.get_tensor(name).shape for name in file.keys()} == {
            "ß": (2, 2),
            "b": (3,),
            "none": (0,),
        }
        assert file.metadata() == {"format": "pt"}


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        (b'{"a": ', b"", "Expecting value"),
        (b"[]", b"", "has no attribute"),
        (json.dumps({"a": ONE}).encode(), b"123", "the tensors end at byte"),
        (json.dumps({"a": ONE}).encode(), b"12345", "the tensors end at byte"),
        (json.dumps({"a": {**ONE, "shape": [2]}}).encode(), b"1234", "does not fit its bytes"),
        (json.dumps({"a": {**ONE, "dtype": "F7"}}).encode(), b"1234", "unknown dtype F7"),
        (json.dumps({"a": ONE, "b": ONE}).encode(), b"1234", "overlap"),
        (b'{"a": {}, "a": {}}', b"", "a name stands in the header twice"),
        (b'{"a": {"dtype": "F32", "shape": [1]}}', b"1234", "data_offsets"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, header: bytes, data: bytes, why: str) -> None:
    file = with_header(tmp_path / "x.safetensors", header, data)
    with pytest.raises(DataError, match=rf"x\.safetensors can't be read as safetensors \(.*{why}"):
        read_header(file)


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(DataError, match="the header is longer than the file"):
        read_header(tmp_path / "x.safetensors")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def pickled(path: Path) -> None:
    torch.save({"w": torch.ones(1)}, path)


class TestFolders:
    @pytest.mark.parametrize("damage", [cut, emptied, pickled])
    def test_a_damaged_file_is_named(self, tmp_path: Path, damage: Callable[[Path], None]) -> None:
        folder = checkpoint(tmp_path / "model", base_model(), "8KB")
        file = sorted(folder.glob("*.safetensors"))[1]
        damage(file)
        with pytest.raises(DataError, match=rf"{file.name} can't be read as safetensors"):
            tensor_places(folder)

    def test_a_missing_file_is_noticed(self, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path / "model", base_model(), "8KB")
        gone = sorted(folder.glob("*.safetensors"))[1]
        gone.unlink()
        with pytest.raises(DataError, match=rf"{gone.name} can't be read .*No such file"):
            tensor_places(folder)

    def test_a_file_of_another_model_is_noticed(self, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path / "model", base_model(), "8KB")
        first, second, *_ = sorted(folder.glob("*.safetensors"))
        shutil.copyfile(first, second)
        with pytest.raises(DataError, match=r"is in .*00001.* and .*00002"):
            tensor_places(folder)
        save_file({"other": torch.ones(1)}, second)
        with pytest.raises(DataError, match=r"index\.json and the files disagree on .* more"):
            tensor_places(folder)

    @pytest.mark.parametrize("layout", ["8KB", "5GB"])
    def test_files_that_are_not_loaded_do_not_count(self, tmp_path: Path, layout: str) -> None:
        folder = checkpoint(tmp_path / "model", base_model(), layout)
        places = tensor_places(folder)
        save_file({"layers.0.wq": torch.ones(2)}, folder / "consolidated.safetensors")
        assert tensor_places(folder) == places

    def test_an_index_without_a_map(self, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path / "model", base_model(), "8KB")
        (folder / INDEX).write_text("[]")
        with pytest.raises(DataError, match=r"index\.json holds no weight_map; restore it"):
            tensor_places(folder)

    def test_a_tensor_in_two_files_is_named(self, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path / "model", base_model())
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
        shutil.copyfile(folder / "weights.safetensors", folder / "again.safetensors")
        with pytest.raises(DataError, match=r"is in again\.safetensors and weights\.safetensors"):
            tensor_places(folder)

    def test_a_folder_that_is_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"holds no HF checkpoint \(config\.json"):
            tensor_places(tmp_path)
