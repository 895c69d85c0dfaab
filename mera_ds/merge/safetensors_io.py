"""Safetensors files without a framework: headers checked strictly, data memory-mapped.

A file is 8 bytes with the header's length, a JSON header (name → dtype, shape, byte range), and
the tensors' bytes without gaps.
"""

import json
import math
import mmap
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mera_ds.errors import DataError, InputError
from mera_ds.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHTS = "*.safetensors"
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes per element of the dtypes that can be averaged."""

DTYPE_NAMES = {"fp64": "F64", "fp32": "F32", "fp16": "F16", "bf16": "BF16"}
"""Their names on the command line."""

_ITEM_SIZES = {
    **FLOATS,
    **dict.fromkeys(("I64", "U64", "C64"), 8),
    **dict.fromkeys(("I32", "U32"), 4),
    **dict.fromkeys(("I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
_MOST_HEADER_BYTES = 100_000_000

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor of a checkpoint is, and what it is."""

    file: Path
    dtype: str
    """As safetensors names it, e.g. `BF16`."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def item_size(self) -> int:
        """Bytes per element."""
        return item_size(self.dtype)

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return self.elements * self.item_size


def item_size(dtype: str) -> int:
    """Return the bytes per element of a safetensors dtype."""
    return _ITEM_SIZES[dtype]


def weight_files(folder: Path) -> list[Path]:
    """Return the files that a checkpoint is loaded from; others (`consolidated`) may lie beside.

    Raises:
        DataError: if the index names no files.
    """
    if (folder / INDEX).exists():
        return [folder / name for name in sorted(set(_weight_map(folder / INDEX).values()))]
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    return sorted(folder.glob(WEIGHTS))


def tensor_places(folder: Path) -> dict[str, TensorPlace]:
    """Return every tensor of an HF checkpoint folder, from the files' headers alone.

    Raises:
        InputError: if the folder holds no safetensors.
        DataError: if a file can't be read, a tensor stands in two files, or the index disagrees.
    """
    files = weight_files(folder)
    if not (folder / "config.json").exists() or not files:
        raise InputError(f"{folder} holds no HF checkpoint (config.json and *.safetensors)")
    places: dict[str, TensorPlace] = {}
    for file in files:
        for name, place in read_header(file).items():
            if name in places:
                raise DataError(
                    f"{folder}: '{name}' is in {places[name].file.name} and {file.name}; "
                    "remove the file that does not belong to the checkpoint"
                )
            places[name] = place
    if (folder / INDEX).exists():
        _require_index(folder / INDEX, places)
    return places


def _weight_map(path: Path) -> dict[str, str]:
    """Return which file of a checkpoint holds each tensor, as its index says."""
    index = read_json(path)
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict) or not named:
        raise DataError(f"{path} holds no weight_map; restore it")
    return {str(name): str(file) for name, file in named.items()}


def _require_index(path: Path, places: Mapping[str, TensorPlace]) -> None:
    named = _weight_map(path)
    odd = sorted(
        name
        for name in named.keys() | places.keys()
        if name not in places or named.get(name) != places[name].file.name
    )
    if odd:
        raise DataError(
            f"{path} and the files disagree on '{odd[0]}'"
            f"{f' and {len(odd) - 1} more' if len(odd) > 1 else ''}; restore the folder"
        )


def read_header(file: Path) -> dict[str, TensorPlace]:
    """Return the tensors of one safetensors file.

    Raises:
        DataError: if it is cut, has bytes that belong to no tensor, or is of another format.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > min(size - 8, _MOST_HEADER_BYTES):
                raise ValueError("the header is longer than the file")
            header = json.loads(opened.read(length), object_pairs_hook=_without_duplicates)
        places = {
            name: _place(file, 8 + length, entry)
            for name, entry in header.items()
            if name != "__metadata__"
        }
        _require_no_gaps(places, 8 + length, size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise DataError(f"{file} can't be read as safetensors ({error}); restore it") from None
    return places


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in the header twice")
    return found


def _place(file: Path, start: int, entry: Mapping[str, Any]) -> TensorPlace:
    begin, end = entry["data_offsets"]
    shape = tuple(int(length) for length in entry["shape"])
    if entry["dtype"] not in _ITEM_SIZES:
        raise ValueError(f"unknown dtype {entry['dtype']}")
    place = TensorPlace(file, entry["dtype"], shape, start + begin)
    if min(shape, default=0) < 0 or end - begin != place.size:
        raise ValueError("a tensor's shape does not fit its bytes")
    return place


def _require_no_gaps(places: Mapping[str, TensorPlace], start: int, size: int) -> None:
    for place in sorted(places.values(), key=lambda place: (place.offset, place.size)):
        if place.offset != start:
            raise ValueError("tensors overlap or leave a gap")
        start += place.size
    if start != size:
        raise ValueError(f"the tensors end at byte {start}, the file at {size}")


def header_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Return the first bytes of a file that holds tensors (name, dtype, shape) in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * item_size(dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class MappedFiles:
    """Reads tensors' bytes from memory-mapped files; threads may share it."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._mapped: dict[Path, Bytes] = {file: _mapped(file) for file in set(files)}

    def raw(self, place: TensorPlace, begin: int = 0, end: int | None = None) -> Bytes:
        """Return the bytes of the elements `begin` to `end` of the flattened tensor."""
        end = place.elements if end is None else end
        start = place.offset + begin * place.item_size
        return self._mapped[place.file][start : place.offset + end * place.item_size]


def _mapped(file: Path) -> Bytes:
    with file.open("rb") as opened:
        return np.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
