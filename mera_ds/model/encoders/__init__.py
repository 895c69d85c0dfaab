"""Frozen encoders, one kind a name; `build_encoder` makes one from its configuration.

A kind of one's own is a subclass of `Encoder` in a plugin, see `mera_ds.plugin`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mera_ds.errors import InputError
from mera_ds.files import sha256_json
from mera_ds.model.encoders.audio import AisfxEncoder
from mera_ds.model.encoders.base import Encoder
from mera_ds.model.encoders.beats import BeatsEncoder
from mera_ds.model.encoders.clip import ClipEncoder, ClipFramesEncoder
from mera_ds.model.encoders.point_bert import PointBertEncoder
from mera_ds.model.encoders.pointcloud import DepthViewsEncoder
from mera_ds.model.encoders.tiny import (
    TinyAudioEncoder,
    TinyImageEncoder,
    TinyPointCloudEncoder,
    TinyVideoEncoder,
)
from mera_ds.model.encoders.visual import ImageEncoder, VideoEncoder
from mera_ds.registry import DECODER, ENCODER, defining_plugins, register
from mera_ds.settings import parse, require_known

__all__ = ["ENCODERS", "Encoder", "build_encoder", "register_encoder"]

ENCODERS: dict[str, type[Encoder]] = {
    "clip-vit": ClipEncoder,
    "clip-vit-frames": ClipFramesEncoder,
    "beats": BeatsEncoder,
    "point-bert": PointBertEncoder,
    "efficientnet-lite0": ImageEncoder,
    "efficientnet-lite0-frames": VideoEncoder,
    "aisfx": AisfxEncoder,
    "depth-views": DepthViewsEncoder,
    "tiny-image": TinyImageEncoder,
    "tiny-video": TinyVideoEncoder,
    "tiny-audio": TinyAudioEncoder,
    "tiny-pointcloud": TinyPointCloudEncoder,
}
"""Kind -> class."""


def register_encoder(kind: str, encoder: type[Encoder]) -> None:
    """Add a plugin's encoder: `media`, `Options`, `transform` and `forward`, see `Encoder`.

    Raises:
        InputError: if the name is taken, or the class is no encoder.
    """
    if not (isinstance(encoder, type) and issubclass(encoder, Encoder)):
        raise InputError(f"encoder kind '{kind}': {encoder!r} is no subclass of Encoder")
    for name in ("media", "Options"):
        if not hasattr(encoder, name):
            raise InputError(f"encoder kind '{kind}': {encoder.__name__} has no '{name}'")
    register(ENCODER, ENCODERS, kind, encoder, [(DECODER, encoder.media)])


def build_encoder(kind: str, options: Mapping[str, Any], weights: Path | None) -> Encoder:
    """Build a frozen encoder.

    Args:
        kind: a name in `ENCODERS`.
        options: the kind's own options; see its `Options`.
        weights: file (for `clip-vit*` also a folder), or None for the kinds without (`tiny-*`).

    Raises:
        InputError: on an unknown kind or option, or weights that are missing or not wanted.
        DataError: on a weights file that does not fit the kind.
    """
    require_known(kind, ENCODERS, "encoder kind")
    cls = ENCODERS[kind]
    encoder = cls(kind, parse(cls.Options, options, f"encoder '{kind}'"), weights)
    if plugins := defining_plugins([(ENCODER, kind)]):
        if not hasattr(encoder, "fingerprint"):
            raise InputError(f"encoder '{kind}': its __init__ must end with self.freeze()")
        # Code that was changed may give other features of the same weights and options.
        encoder.fingerprint = sha256_json([encoder.fingerprint, sorted(plugins.values())])
    return encoder
