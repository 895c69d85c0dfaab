"""Pictures: upright RGB from anything Pillow reads of the usual formats."""

import io
import struct
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mera_ds.media.errors import Unusable

MAX_IMAGE_PIXELS = 64_000_000
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SIXTEEN_TO_EIGHT_BITS = 257
"""65535 / 255: a 16-bit value divided by it is the same brightness in 8 bits."""

_BROKEN_IMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow's readers raise on damaged files."""


def decode_image(content: bytes, extension: str) -> Image.Image:
    """Return a picture in RGB, turned as its EXIF orientation says; the extension isn't used."""
    with pillow_errors():
        image = open_image(content)
        ImageOps.exif_transpose(image, in_place=True)
        return on_white(image)


def open_image(content: bytes) -> Image.Image:
    """Open an image; Pillow reads its header only, so the size is known before its pixels are."""
    image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
    require_image_size(image.width, image.height)
    return image


def require_image_size(width: int, height: int) -> None:
    """Raise `Unusable` for more than `MAX_IMAGE_PIXELS`."""
    if width * height > MAX_IMAGE_PIXELS:
        raise Unusable(f"it has {width} x {height} pixels, more than {MAX_IMAGE_PIXELS}")


def on_white(image: Image.Image) -> Image.Image:
    """Return a picture or frame of any mode in RGB, transparency on white."""
    if image.mode.startswith("I"):
        # Greyscale of 16 bits: Pillow's own conversion clips at 255.
        values = np.asarray(image, dtype=np.float64) / SIXTEEN_TO_EIGHT_BITS
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    white.alpha_composite(layer)
    return white.convert("RGB")


class pillow_errors(warnings.catch_warnings):
    """Turn what Pillow raises on damaged or outsized images into `Unusable`."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        if isinstance(error, _BROKEN_IMAGE):
            raise Unusable(f"{type(error).__name__}: {error}") from None
