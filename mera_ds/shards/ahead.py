"""Bringing a local tar into memory in one sweep, before its samples are asked for one by one.

Its samples are read in random order. A disk gives scattered places several times slower than a
file from end to end, and what came in scattered is slower to read from memory, too: the kernel
keeps it page by page instead of in large pieces.
"""

import errno
import os

STRETCH = 1 << 20
"""Bytes that are read at once."""


def read_ahead(descriptor: int, size: int) -> None:
    """Read a file of `size` bytes unless its middle is in memory; errors are left to its readers.

    Where the kernel can't say what is in memory, it is asked to read ahead by itself.
    """
    try:
        if _in_memory(descriptor, size // 2):
            return
        buffer = memoryview(bytearray(min(STRETCH, size)))
        for start in range(0, size, STRETCH):
            os.preadv(descriptor, [buffer], start)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)


def _in_memory(descriptor: int, offset: int) -> bool:
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    return True
