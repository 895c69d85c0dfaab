"""Frozen encoders, one kind a name; `build_encoder` makes one from its configuration.

A kind of one's own is a subclass of `Encoder` and an entry in `ENCODERS`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mera_ds.config import parse, require_known
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

__all__ = ["ENCODERS", "Encoder", "build_encoder"]

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
    return cls(kind, parse(cls.Options, options, f"encoder '{kind}'"), weights)
