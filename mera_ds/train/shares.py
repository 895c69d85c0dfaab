"""Tensors that all ranks hold together, written as safetensors files by all of them.

A model under ZeRO-3 fits on no single rank, so nobody gathers it. Its tensors are dealt to files by
size, and the files to the ranks in turn. Each tensor is put together once, on every rank, and
written by the one that its file belongs to; a rank holds two tensors at most. How many ranks there
are changes who writes a file, not what is in it.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mera_ds.config import Dtype
from mera_ds.distributed import World, gather, main_rank_first, share, together
from mera_ds.errors import DataError, MeraError, ResourceError
from mera_ds.files import (
    committed_folder,
    full_disk_is_an_error,
    require_space,
    sha256_file,
)
from mera_ds.merge.safetensors_io import DTYPE_NAMES, header_bytes, item_size
from mera_ds.model.backbone import DTYPES

SHARE_BYTES = 1_000_000_000
"""Largest file, unless a single tensor is larger: small enough that every rank has some."""


@dataclass(frozen=True)
class SharedTensor:
    """A tensor that ranks put together."""

    name: str
    shape: tuple[int, ...]
    gather: Callable[[], Tensor]
    """Returns the full tensor; every rank must call it."""


@contextmanager
def shared_folder(final: Path, size: int, world: World) -> Iterator[Path]:
    """Yield, on every rank, one folder that becomes `final`: a `committed_folder` for all.

    Raises:
        ResourceError: on every rank, if `size` bytes don't fit on the disk.
    """
    with ExitStack() as stack:
        made = None
        with main_rank_first(world) as mine:
            if mine:
                require_space(final, size + 1_000_000)
                made = stack.enter_context(committed_folder(final))
        yield Path(share(made))
        with main_rank_first(world) as mine:
            if mine:
                stack.close()


def size_of(tensors: Sequence[SharedTensor], dtype: Dtype) -> int:
    """Return how many bytes some tensors take in a dtype."""
    return sum(math.prod(entry.shape) for entry in tensors) * item_size(DTYPE_NAMES[dtype])


def write_shares(
    folder: Path, stem: str, tensors: Sequence[SharedTensor], dtype: Dtype, world: World
) -> dict[str, tuple[str, list[str]]]:
    """Write tensors as `<stem>-00001-of-0000n.safetensors` in a dtype; every rank must call it.

    Returns:
        By file, its SHA-256 and the names of its tensors.

    Raises:
        DataError: on every rank, if a tensor is not finite.
        ResourceError: on every rank, if the disk is full.
    """
    groups = _groups(tensors, item_size(DTYPE_NAMES[dtype]))
    files = [f"{stem}-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    written: dict[str, str] = {}
    for first in range(0, len(groups), world.size):
        row = list(zip(files, groups, strict=True))[first : first + world.size]
        with together():
            written |= _write_row(folder, row, dtype, world.rank)
    hashes = {file: sha256 for entry in gather(written) for file, sha256 in entry.items()}
    return {
        file: (hashes[file], [entry.name for entry in group])
        for file, group in zip(files, groups, strict=True)
    }


def _write_row(
    folder: Path, row: Sequence[tuple[str, Sequence[SharedTensor]]], dtype: Dtype, rank: int
) -> dict[str, str]:
    """Write one file per rank at the same time; return this rank's with its SHA-256.

    A rank whose disk is full goes on to gather, since the others wait for it.
    """
    mine = None
    if rank < len(row):
        file, group = row[rank]
        mine = _ShareWriter(folder / file, group, dtype)
    for entries in zip_longest(*(group for _, group in row)):
        own = None
        for owner, entry in enumerate(entries):
            if entry is not None:
                value = entry.gather()
                own = value if owner == rank else own
        if mine is not None and own is not None:
            mine.add(own)
    return {} if mine is None else {mine.path.name: mine.close()}


def _groups(tensors: Sequence[SharedTensor], width: int) -> list[list[SharedTensor]]:
    groups: list[list[SharedTensor]] = []
    filled = 0
    for entry in tensors:
        size = math.prod(entry.shape) * width
        if not groups or filled + size > SHARE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += size
    return groups


class _ShareWriter:
    """Writes one file tensor by tensor, in the order of its header; errors wait for the end."""

    def __init__(self, path: Path, group: Sequence[SharedTensor], dtype: Dtype) -> None:
        self.path = path
        self._names = iter([entry.name for entry in group])
        self._dtype = DTYPES[dtype]
        self._hash = hashlib.sha256()
        self._error: MeraError | None = None
        header = header_bytes((entry.name, DTYPE_NAMES[dtype], entry.shape) for entry in group)
        with self._postponed():
            self._file = path.open("wb")
            self._write(memoryview(header))

    @contextmanager
    def _postponed(self) -> Iterator[None]:
        try:
            with full_disk_is_an_error(self.path):
                yield
        except MeraError as error:
            self._error = error
        except OSError as error:
            self._error = ResourceError(f"{self.path} can't be written ({error})")

    def add(self, value: Tensor) -> None:
        """Write the next tensor, unless something went wrong before."""
        name = next(self._names)
        if self._error is not None:
            return
        ready = value.detach().to("cpu", self._dtype).contiguous()
        with self._postponed():
            if not bool(torch.isfinite(ready).all()):
                raise DataError(
                    f"{self.path.name}: tensor '{name}' is not finite and was not saved"
                )
            self._write(ready.flatten().view(torch.uint8).numpy().data)

    def _write(self, content: memoryview) -> None:
        self._file.write(content)
        self._hash.update(content)

    def close(self) -> str:
        """Bring the file to disk and return its SHA-256, or raise what went wrong."""
        if self._error is None:
            with self._postponed(), self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
        if self._error is not None:
            raise self._error
        return self._hash.hexdigest()


class SharedFiles(Mapping[str, Tensor]):
    """The tensors of such files, each read when it is asked for."""

    def __init__(self, folder: Path, files: Mapping[str, str], world: World) -> None:
        """Open the files and check them; every rank must call it.

        Args:
            folder: where they are.
            files: their SHA-256, by name; each rank checks its part of them.
            world: this process among the ranks.

        Raises:
            DataError: on every rank, if a file is missing or damaged.
        """
        names = sorted(files)
        with together():
            for name in names[world.rank :: world.size]:
                if not (folder / name).exists():
                    raise DataError(f"{folder / name} is missing; restore it, or delete {folder}")
                if sha256_file(folder / name) != files[name]:
                    raise DataError(
                        f"{folder / name} was changed or damaged (its SHA-256 differs); restore "
                        f"it, or delete {folder}"
                    )
        self._files = {}
        for name in names:
            try:
                file = safe_open(str(folder / name), framework="pt")
            except (SafetensorError, OSError) as error:
                raise DataError(f"{folder / name} can't be read ({error}); restore it") from None
            self._files.update(dict.fromkeys(file.keys(), file))

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor."""
        value: Tensor = self._files[name].get_tensor(name)
        return value

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self._files)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._files)
