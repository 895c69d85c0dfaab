"""What encoders and connectors are: tokens, width, parameters.

Those of the paper are known by their kinds, so nothing of theirs has to be there. Others are built
(they are small), which also holds for a plugin's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mera_ds.config import ModalityConfig, resolve_path


@dataclass(frozen=True)
class Part:
    """An encoder as far as estimates need it."""

    tokens: int
    """Feature tokens of a typical medium."""
    width: int
    parameters: float
    flops: float
    """Of encoding one medium."""


def _clip(options: Mapping[str, Any]) -> Part:
    """ViT-L/14-336 without its last layer, on one picture."""
    return Part(576, 1024, 291e6, 2 * 291e6 * 577)


def _clip_frames(options: Mapping[str, Any]) -> Part:
    frames, pooling = int(options.get("frames", 4)), int(options.get("pooling", 2))
    one = _clip(options)
    return Part(frames * (-(-24 // pooling)) ** 2, one.width, one.parameters, frames * one.flops)


def _beats(options: Mapping[str, Any]) -> Part:
    """On a clip of 10 s."""
    return Part(496, 768, 90e6, 2 * 90e6 * 496)


def _point_bert(options: Mapping[str, Any]) -> Part:
    return Part(513, 384, 22e6, 2 * 22e6 * 513)


KNOWN: Mapping[str, Callable[[Mapping[str, Any]], Part]] = {
    "clip-vit": _clip,
    "clip-vit-frames": _clip_frames,
    "beats": _beats,
    "point-bert": _point_bert,
}


def encoder_part(settings: ModalityConfig, run: Path) -> Part:
    """Return what a modality's encoder is.

    Raises:
        InputError: if it is of no known kind and its weights are missing.
        DataError: if they don't fit.
    """
    encoder = settings.encoder
    if encoder.kind in KNOWN:
        return KNOWN[encoder.kind](encoder.options)
    from mera_ds.model.encoders import build_encoder

    weights = None if encoder.weights is None else resolve_path(encoder.weights, run)
    built = build_encoder(encoder.kind, encoder.options, weights)
    parameters = sum(entry.numel() for entry in built.parameters())
    # Convolutions use a weight at every position: a picture of 224 pixels has about 100.
    return Part(built.max_tokens, built.feature_dim, parameters, 2 * 100 * parameters)


def connector_part(settings: ModalityConfig, encoder: Part, width: int) -> tuple[int, int]:
    """Return how many parameters a modality's connector has, and how many tokens it makes.

    Args:
        settings: the modality's.
        encoder: what its encoder is.
        width: of the backbone.
    """
    from mera_ds.model.connectors import build_connector

    connector = settings.connector
    options = {name: value for name, value in connector.options.items() if name != "output_rms"}
    built = build_connector(connector.kind, options, encoder.width, width)
    parameters = sum(entry.numel() for entry in built.parameters())
    return parameters, built.num_tokens(encoder.tokens)
