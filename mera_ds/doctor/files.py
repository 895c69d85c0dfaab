"""Weight files by their headers: complete or not, and which tensors they hold."""

import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mera_ds.errors import DataError, InputError
from mera_ds.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LONGEST_HEADER = 100_000_000
"""Bytes; that of safetensors itself."""

Shapes = Mapping[str, tuple[int, ...]]


def size_text(size: int) -> str:
    """Return `15.0 GB` or `1.7 MB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a safetensors file, and check that it is whole.

    Raises:
        InputError: if it does not exist.
        DataError: if it is cut off, or no safetensors file.
    """
    if not path.is_file():
        raise InputError(f"{path.name} is missing")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(LONGEST_HEADER, size):
            raise DataError(f"{path.name} is no safetensors file, or cut off in its header")
        text = file.read(length)
    try:
        header = json.loads(text)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise DataError(f"{path.name} is no safetensors file: its header can't be read") from None
    if size != 8 + length + end:
        raise DataError(
            f"{path.name} has {size} bytes, its header says {8 + length + end}; copy it again"
        )
    return shapes


def check_torch_file(path: Path) -> str:
    """Describe a file of `torch.save`; of what is in it, nothing is read.

    Raises:
        DataError: if it is cut off, or something else.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(2)
    if zipfile.is_zipfile(path):
        return size_text(size)
    if start == b"PK":
        raise DataError(f"{path.name} has {size} bytes and is cut off; copy it again")
    if start[:1] == b"\x80":
        return f"{size_text(size)}, torch's old format, whose size can't be checked"
    raise DataError(f"{path.name} is no file of torch.save")


def indexed_files(folder: Path) -> dict[str, set[str]]:
    """Return the safetensors files of an HF folder, with the tensors that its index puts there.

    Raises:
        InputError: if there are none.
        DataError: if the index can't be read.
    """
    if (folder / INDEX).exists():
        files: dict[str, set[str]] = {}
        weights = read_object(folder / INDEX).get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise DataError(f"{INDEX} holds no weight_map; copy it again")
        for tensor, name in weights.items():
            files.setdefault(str(name), set()).add(tensor)
        return dict(sorted(files.items()))
    if (folder / SINGLE).exists():
        return {SINGLE: set()}
    raise InputError(f"it holds neither {INDEX} nor {SINGLE}")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object, such as `config.json`.

    Raises:
        InputError: if the file does not exist.
        DataError: if it can't be read.
    """
    if not path.is_file():
        raise InputError(f"{path.name} is missing")
    try:
        value = read_json(path)
    except InputError as error:
        raise DataError(str(error)) from None
    if not isinstance(value, dict):
        raise DataError(f"{path.name} holds no JSON object; copy it again")
    return value


def require_shapes(found: Shapes, wanted: Shapes, prefixes: tuple[str, ...], name: str) -> None:
    """Check a few tensors of a file, under any one of some prefixes.

    Raises:
        DataError: naming the first one that is missing or of another shape.
    """
    first = next(iter(wanted))
    prefix = next((entry for entry in prefixes if f"{entry}{first}" in found), None)
    if prefix is None:
        raise DataError(f"{name} holds no tensor '{first}'; it is a file of another network")
    for tensor, shape in wanted.items():
        got = found.get(f"{prefix}{tensor}")
        if got != shape:
            raise DataError(f"{name}: '{tensor}' has shape {got}, expected {shape}")
