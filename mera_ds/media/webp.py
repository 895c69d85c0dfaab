"""Writes frames as one lossless animated WebP.

Pillow's and libwebp's own animation writer joins equal neighbours into one longer frame, so that a
clip which stands still for a moment would lose its even spacing. Here every frame is a still WebP,
put into the container's frame chunks one by one: simple, lossless, the same bytes every time.
"""

import io
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MILLISECONDS = 500
"""How long a viewer shows a frame; it says nothing of the source's time."""
MAX_SIDE = 16383
_ANIMATED = 0b10
_NO_BLENDING = 0b10


def encode_frames(frames: NDArray[np.uint8]) -> bytes:
    """Return frames (F, H, W, 3) as an animated WebP, losslessly.

    Raises:
        ValueError: there is no frame, or one is wider or higher than WebP allows (16383 pixels).
    """
    count, height, width, _ = frames.shape
    if not count or max(height, width) > MAX_SIDE:
        raise ValueError(f"{count} frames of {width} x {height} pixels don't fit in a WebP")
    canvas = struct.pack("<B3x", _ANIMATED) + _uint24(width - 1) + _uint24(height - 1)
    head = bytes(6) + _uint24(width - 1) + _uint24(height - 1)
    head += _uint24(MILLISECONDS) + bytes((_NO_BLENDING,))
    chunks = _chunk(b"VP8X", canvas) + _chunk(b"ANIM", bytes(6))
    for frame in frames:
        chunks += _chunk(b"ANMF", head + _still_chunk(frame))
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def _still_chunk(frame: NDArray[np.uint8]) -> bytes:
    """Return the bitstream chunk (`VP8L`) of one picture."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "WEBP", lossless=True, quality=50, method=3)
    content = buffer.getvalue()
    assert content[12:16] == b"VP8L", content[12:16]
    return content[12:]


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def _uint24(value: int) -> bytes:
    return struct.pack("<I", value)[:3]
