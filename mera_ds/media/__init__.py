"""From a medium's bytes to pixels, samples or points. Broken or outsized media are `DataError`s.

Media come from anywhere, so nothing here trusts them: sizes are checked before memory is
allocated, formats are fixed by kind, and no pickle is read.
"""

from collections.abc import Callable, Collection
from typing import Any

from mera_ds.errors import DataError
from mera_ds.media.audio import Audio, decode_audio
from mera_ds.media.errors import Unusable
from mera_ds.media.image import decode_image
from mera_ds.media.points import decode_points
from mera_ds.media.video import decode_video
from mera_ds.registry import DECODER, register
from mera_ds.settings import require_known

__all__ = ["Audio", "DECODERS", "Unusable", "decode", "register_decoder"]

DECODERS: dict[str, Callable[[bytes, str], Any]] = {
    "image": decode_image,
    "video": decode_video,
    "audio": decode_audio,
    "pointcloud": decode_points,
}
"""Kind of medium -> function of (content, extension); raises `Unusable`."""


def decode(modality_kind: str, extension: str, content: bytes, name: str) -> Any:
    """Decode one medium.

    Args:
        modality_kind: `image`, `video`, `audio` or `pointcloud`.
        extension: the file's extension without its dot; it decides how a video is read.
        content: the file's bytes.
        name: what messages call the medium, e.g. `image/apple-1`.

    Returns:
        image: an upright RGB `PIL.Image`, transparency on white; video: uint8 (F, H, W, 3), RGB;
        audio: `Audio`; pointcloud: float32 (N, 3) or (N, 6).

    Raises:
        DataError: on a medium that is damaged, empty or too large, naming it and the cause.
    """
    require_known(modality_kind, DECODERS, f"{name}: modality kind")
    try:
        return DECODERS[modality_kind](content, extension.lower())
    except Unusable as error:
        raise DataError(f"{name}: this {modality_kind} can't be used: {error}") from None


def register_decoder(
    kind: str, extensions: Collection[str], function: Callable[[bytes, str], Any]
) -> None:
    """Add a plugin's kind of media.

    Args:
        kind: what encoders of this kind call their `media`.
        extensions: the files it reads, e.g. `{"npy"}`.
        function: (bytes, extension) -> the decoded medium. Whatever it raises becomes a `DataError`
            that names the sample.

    Raises:
        InputError: if the name is taken.
    """

    def decoder(content: bytes, extension: str) -> Any:
        if extension not in extensions:
            raise Unusable(f"it ends with .{extension}; expected .{', .'.join(sorted(extensions))}")
        try:
            return function(content, extension)
        except Exception as error:
            raise Unusable(f"{type(error).__name__}: {error}") from error

    register(DECODER, DECODERS, kind, decoder)
