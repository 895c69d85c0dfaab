"""What every encoder is: a frozen network with its own preprocessing and a fingerprint.

Shape letters: B media, N feature tokens, D feature width, C channels, H and W pixels.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mera_ds.batch import Features
from mera_ds.errors import DataError, InputError
from mera_ds.files import sha256_json


class Encoder(nn.Module):
    """Frozen network of one modality: media -> features (B, N, D).

    It is in evaluation mode always, none of its parameters requires a gradient, and `transform`
    is deterministic, so the features of a medium depend on its bytes and `fingerprint` alone.
    """

    media: ClassVar[str]
    """The decoded kind that `transform` takes: image, video, audio or pointcloud."""
    Options: ClassVar[type[Any]]
    """The kind's own options: a frozen dataclass."""
    revision: ClassVar[int] = 1
    """Part of the fingerprint; raise it when the same weights and options give other features."""
    feature_dim: int
    max_tokens: int
    """Largest N; `forward` pads to it."""
    fingerprint: str
    """SHA-256 over kind, revision, options and weights."""

    def __init__(self, kind: str, options: Any, weights: Path | None) -> None:
        super().__init__()
        self.kind = kind
        self.options = options

    def transform(self, media: Any) -> Tensor:
        """Turn one decoded medium into the network's input, on the CPU."""
        raise NotImplementedError

    def forward(self, inputs: Sequence[Tensor]) -> Features:
        """Encode transformed media; values are fp32, on the encoder's device."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Fix weights and mode, and take the fingerprint; the last act of a constructor."""
        self.requires_grad_(False)
        self.eval()
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        self.fingerprint = sha256_json(
            {
                "kind": self.kind,
                "revision": self.revision,
                "options": dataclasses.asdict(self.options),
                "weights": digest.hexdigest(),
            }
        )

    def train(self, mode: bool = True) -> "Encoder":
        """Stay in evaluation mode, whatever the model around is switched to."""
        return super().train(False)


def load_weights(network: nn.Module, weights: Path | None, kind: str) -> None:
    """Load a safetensors file into a network, exactly.

    Raises:
        InputError: if no file is given, or it does not exist.
        DataError: if a tensor is missing, unknown, of another shape or not finite.
    """
    if weights is None:
        raise InputError(f"encoder '{kind}' needs weights: give the path of a safetensors file")
    if not weights.is_file():
        raise InputError(f"encoder '{kind}': weights {weights} do not exist")
    try:
        state = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{weights} is not a readable safetensors file: {error}") from None
    own = network.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name not in state:
            raise DataError(f"{weights} has no tensor '{name}'; is it a file for '{kind}'?")
        if name not in own:
            raise DataError(f"{weights} holds '{name}', which '{kind}' does not know")
        if own[name].shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            raise DataError(f"{weights}: '{name}' has shape {shapes}")
        if not torch.isfinite(state[name]).all():
            raise DataError(f"{weights}: '{name}' holds values that are not finite")
    network.load_state_dict(state)
