"""Fingerprints of weights at the speed of memory: which weights, however they are cut into files.

SHA-256 takes longer than the whole merge. A block of 2M elements is first summed in 1024 columns
of 64-bit words; SHA-256 is taken of the sums. Any damaged byte, page or file changes the result;
it is no protection against somebody who wants two models to look alike.
"""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from mera_ds.files import sha256_json
from mera_ds.merge.safetensors_io import Bytes, MappedFiles, TensorPlace

BLOCK = 1 << 21
"""Elements of a tensor that are read, merged and fingerprinted together."""

_COLUMNS = 1024
_ROW_BYTES = 8 * _COLUMNS


class BlockDigest:
    """The fingerprint of one block, whose bytes arrive in pieces."""

    def __init__(self) -> None:
        self._sums: NDArray[np.uint64] = np.zeros(_COLUMNS, np.uint64)
        self._tail = b""

    def add(self, piece: Bytes) -> None:
        """Add the next bytes; all pieces but the last are multiples of 8192 bytes."""
        whole = piece.size - piece.size % _ROW_BYTES
        if whole:
            rows = piece[:whole].view(np.uint64).reshape(-1, _COLUMNS)
            self._sums += np.add.reduce(rows, axis=0)
        self._tail += piece[whole:].tobytes()

    def digest(self) -> bytes:
        """Return the block's 32 bytes."""
        return hashlib.sha256(self._sums.tobytes() + self._tail).digest()


def tensor_digest(dtype: str, shape: tuple[int, ...], blocks: Iterable[bytes]) -> str:
    """Return a tensor's fingerprint from those of its blocks, in order."""
    head = sha256_json([dtype, list(shape)])
    return hashlib.sha256(head.encode() + b"".join(blocks)).hexdigest()


def weights_digest(tensors: Mapping[str, str]) -> str:
    """Return the fingerprint of a whole model from those of its tensors."""
    return sha256_json(dict(tensors))


def block_ranges(elements: int) -> list[tuple[int, int]]:
    """Return begin and end of every block of a tensor; an empty tensor has one empty block."""
    starts = range(0, max(elements, 1), BLOCK)
    return [(start, min(start + BLOCK, elements)) for start in starts]


def read_digests(places: Mapping[str, TensorPlace], workers: int) -> dict[str, str]:
    """Return the fingerprint of every tensor of a checkpoint, read from its files."""
    files = MappedFiles(place.file for place in places.values())

    def one(place: TensorPlace) -> str:
        digests = []
        for begin, end in block_ranges(place.elements):
            block = BlockDigest()
            block.add(files.raw(place, begin, end))
            digests.append(block.digest())
        return tensor_digest(place.dtype, place.shape, digests)

    with ThreadPoolExecutor(workers) as threads:
        return dict(zip(places, threads.map(one, places.values()), strict=True))
