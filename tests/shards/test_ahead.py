"""Reading a tar ahead brings the whole file into memory, once."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mera_ds.shards.ahead import STRETCH, read_ahead

PAGE = os.sysconf("SC_PAGE_SIZE")
SIZE = 3 * STRETCH + 12_345


@pytest.fixture
def cold(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "00000.tar"
    path.write_bytes(os.urandom(SIZE))
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    yield descriptor
    os.close(descriptor)


def _pages_in_memory(descriptor: int) -> int:
    found = 0
    for offset in range(0, SIZE, PAGE):
        try:
            found += os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            continue
        except OSError:
            pytest.skip("this file system does not say what is in memory")
    return found


def test_the_whole_file_comes_into_memory(cold: int) -> None:
    read_ahead(cold, SIZE)
    assert _pages_in_memory(cold) == -(-SIZE // PAGE)


def test_a_file_whose_middle_is_in_memory_is_left_alone(cold: int) -> None:
    os.posix_fadvise(cold, 0, 0, os.POSIX_FADV_RANDOM)  # so that one page brings in no others
    os.pread(cold, 1, SIZE // 2)
    read_ahead(cold, SIZE)
    assert _pages_in_memory(cold) < SIZE // PAGE // 2


@pytest.mark.parametrize("size", [0, 1])
def test_tiny_files_are_read_as_before(tmp_path: Path, size: int) -> None:
    path = tmp_path / "tiny"
    path.write_bytes(b"x" * size)
    with path.open("rb") as file:
        read_ahead(file.fileno(), size)
        assert file.read() == b"x" * size


def test_what_cannot_be_read_is_left_to_its_reader() -> None:
    out, into = os.pipe()
    try:
        os.write(into, b"kept")
        read_ahead(out, STRETCH)
        assert os.read(out, 10) == b"kept"
    finally:
        os.close(out)
        os.close(into)
