"""Ogg Vorbis files that are the same every time.

An encoder gives each stream a random serial number, so that two files of one sound differ. Here
it is always 1, in every page, with the page's checksum to match.
"""

import io

import numpy as np
import numpy.typing as npt
import soundfile

COMPRESSION = 0.85
"""Between 0 (best quality) and 1 (smallest file)."""
_SERIAL = (1).to_bytes(4, "little")
_POLYNOMIAL = 0x04C11DB7


def encode_ogg(waveform: npt.NDArray[np.float32], rate: int) -> bytes:
    """Return mono samples (n,) as an Ogg Vorbis file."""
    target = io.BytesIO()
    soundfile.write(
        target, waveform, rate, format="OGG", subtype="VORBIS", compression_level=COMPRESSION
    )
    return with_fixed_serial(target.getvalue())


def with_fixed_serial(content: bytes) -> bytes:
    """Return an Ogg file whose stream has the serial number 1."""
    pages = []
    position = 0
    while position < len(content):
        assert content[position : position + 4] == b"OggS", position
        segments = content[position + 26]
        sizes = content[position + 27 : position + 27 + segments]
        end = position + 27 + segments + sum(sizes)
        page = bytearray(content[position:end])
        page[14:18] = _SERIAL
        page[22:26] = bytes(4)
        page[22:26] = _checksum(page).to_bytes(4, "little")
        pages.append(bytes(page))
        position = end
    return b"".join(pages)


def _table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1) ^ (_POLYNOMIAL if value & 0x80000000 else 0)
        table.append(value & 0xFFFFFFFF)
    return table


_TABLE = _table()


def _checksum(page: bytes | bytearray) -> int:
    """Return the CRC-32 of the Ogg format: not reflected, starting at zero."""
    value = 0
    for byte in page:
        value = ((value << 8) & 0xFFFFFFFF) ^ _TABLE[(value >> 24) ^ byte]
    return value
