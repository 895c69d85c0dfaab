"""Sound encoder of the paper: BEATs iter3+ (AS2M), from its official file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mera_ds.batch import Features
from mera_ds.config import Dtype
from mera_ds.errors import DataError, InputError
from mera_ds.media.audio import MAX_AUDIO_SECONDS
from mera_ds.model.backbone import DTYPES
from mera_ds.model.encoders.base import Encoder, require_weights
from mera_ds.model.encoders.beats_network import BeatsConfig, BeatsNetwork, reduce_mask
from mera_ds.model.encoders.fbank import (
    HOP,
    SAMPLE_RATE,
    WINDOW,
    fbank,
    mel_filters,
    num_frames,
)
from mera_ds.model.encoders.waveform import Waveform, mono
from mera_ds.model.official import OfficialFile, load_exactly, read_official
from mera_ds.settings import parse

RENAMED = {
    "encoder.pos_conv.0.parametrizations.weight.original0": "encoder.pos_conv.0.weight_g",
    "encoder.pos_conv.0.parametrizations.weight.original1": "encoder.pos_conv.0.weight_v",
}
"""Files saved with torch's newer weight normalisation -> the official names."""


@dataclass(frozen=True, kw_only=True)
class BeatsOptions:
    """Options of `beats`."""

    max_seconds: float = 30.0
    """Longest clip; the rest is cut off."""
    padding: Literal["clip", "batch"] = "clip"
    """`clip`: in any batch, a clip has the tokens that the official code gives for it alone;
    `batch`: those that it gives in a padded batch, where the last tokens of a clip (its mask has
    up to 8 more) also see padding, and depend on the batch's longest clip."""
    cfg: Mapping[str, Any] = field(default_factory=dict)
    """The official `cfg`, for a weight file that has none."""
    dtype: Dtype = "fp32"
    """Compute dtype; the spectrogram is always fp32."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < self.max_seconds <= MAX_AUDIO_SECONDS:
            raise InputError(
                f"max_seconds is {self.max_seconds}; it must be in (0, {MAX_AUDIO_SECONDS}], since "
                "no more of a sound is read"
            )


def read_config(file: OfficialFile, options: BeatsOptions, path: Path) -> BeatsConfig:
    """Return a weight file's `cfg`: its own (in safetensors: JSON in the metadata) or the options'.

    Raises:
        InputError: if neither or both have one.
        DataError: if it describes no network that can be built.
    """
    given: Any = file.rest.get("cfg")
    if given is not None and options.cfg:
        raise InputError(f"{path} holds its own cfg; remove the option 'cfg'")
    if given is None and not options.cfg:
        raise InputError(
            f"{path} holds no 'cfg', and its architecture is not known without; use the official "
            "file, or give its cfg as the encoder's option 'cfg'"
        )
    try:
        values = json.loads(given) if isinstance(given, str) else given or options.cfg
        known = {entry.name for entry in fields(BeatsConfig)}
        wanted = {name: value for name, value in values.items() if name in known}
        return parse(BeatsConfig, wanted, "cfg")
    except (InputError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: its cfg can't be used: {error}") from None


class BeatsEncoder(Encoder):
    """Kind `beats`: a clip -> 8 tokens of width 768 for every 0.16 s (10 s: 496, 30 s: 1496).

    A clip of n samples at 16 kHz has T = 1 + (n - 400) // 160 frames and T // 16 · 8 tokens. One
    that is too short for a token, or empty, is followed by silence up to 0.175 s, which has 8.
    """

    Options = BeatsOptions
    media = "audio"

    def __init__(self, kind: str, options: BeatsOptions, weights: Path | None) -> None:
        super().__init__(kind, options, weights)
        path = require_weights(weights, kind, "the official .pt file")
        file = read_official(path, f"encoder '{kind}'")
        config = read_config(file, options, path)
        state = {
            RENAMED.get(name, name): tensor
            for name, tensor in file.tensors.items()
            if not name.startswith("predictor.")  # the classifier of fine-tuned files
        }
        with torch.device("meta"):
            self.network = BeatsNetwork(config)
        load_exactly(self.network, state, path, kind)
        self.network.to(DTYPES[options.dtype])
        self.feature_dim = config.encoder_embed_dim
        self.shortest = WINDOW + (config.input_patch_size - 1) * HOP
        self.longest = max(round(options.max_seconds * SAMPLE_RATE), self.shortest)
        self.max_tokens = self.num_tokens(self.longest)
        self.freeze(asdict(config))
        self._filters = mel_filters()

    def num_tokens(self, samples: int) -> int:
        """Return how many tokens a clip of so many samples at 16 kHz has."""
        return self.network.config.num_tokens(num_frames(max(samples, self.shortest)))

    def transform(self, media: Waveform) -> Tensor:
        """Sound -> its mono samples (n,) at 16 kHz, at most `max_seconds` of them."""
        signal = mono(media, SAMPLE_RATE, self.longest)[: self.longest]
        return torch.nn.functional.pad(signal, (0, max(self.shortest - len(signal), 0)))

    @torch.no_grad()
    def forward(self, inputs: Sequence[Tensor]) -> Features:
        """Encode clips (n_b,); the mask covers each clip's own tokens."""
        device = next(self.network.parameters()).device
        lengths = [len(clip) for clip in inputs]
        signals = torch.nn.utils.rnn.pad_sequence(list(inputs), batch_first=True).to(device)
        logs = fbank(signals, self._filters.to(device))
        padding = self._padding(lengths, logs.shape[1]).to(device)
        tokens = self.network(logs, padding if padding.any() else None).float()
        return Features(tokens.masked_fill(padding[..., None], 0), ~padding)

    def _padding(self, lengths: Sequence[int], frames: int) -> Tensor:
        """Return which tokens of each clip (B, N) are padding."""
        count = self.network.config.num_tokens(frames)
        if self.options.padding == "clip":
            real = torch.tensor([self.num_tokens(length) for length in lengths])
            return torch.arange(count) >= real[:, None]
        samples = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
        return reduce_mask(reduce_mask(samples, frames), count)
