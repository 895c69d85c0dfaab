"""What every encoder is: a frozen network with its own preprocessing and a fingerprint.

Shape letters: B media, N feature tokens, D feature width, C channels, H and W pixels.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mera_ds.batch import Features
from mera_ds.errors import InputError
from mera_ds.files import sha256_json
from mera_ds.model.official import load_exactly, read_official


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
    """Largest N that `forward` can give."""
    feature_dtype: torch.dtype = torch.float32
    """What features are rounded to, cached or not (`modalities.X.feature_dtype`)."""
    fingerprint: str
    """SHA-256 over kind, revision, options, architecture and weights."""

    def __init__(self, kind: str, options: Any, weights: Path | None) -> None:
        super().__init__()
        self.kind = kind
        self.options = options

    def transform(self, media: Any) -> Tensor:
        """Turn one decoded medium into the network's input, on the CPU."""
        raise NotImplementedError

    def forward(self, inputs: Sequence[Tensor]) -> Features:
        """Encode transformed media; values are fp32, on the encoder's device.

        N is the batch's own, up to `max_tokens`; the mask says which tokens are real.
        """
        raise NotImplementedError

    def freeze(self, architecture: Mapping[str, Any] | None = None) -> None:
        """Fix weights and mode, and take the fingerprint; the last act of a constructor.

        Args:
            architecture: what else decides the features if a weight file brings it along.
        """
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
                "architecture": dict(architecture or {}),
                "weights": digest.hexdigest(),
            }
        )

    def train(self, mode: bool = True) -> "Encoder":
        """Stay in evaluation mode, whatever the model around is switched to."""
        return super().train(False)


def load_weights(network: nn.Module, weights: Path | None, kind: str) -> None:
    """Load a file into a network, exactly.

    Raises:
        InputError: if no file is given, or it does not exist.
        DataError: if a tensor is missing, unknown, of another shape or not finite.
    """
    path = require_weights(weights, kind, "a safetensors file")
    load_exactly(network, read_official(path, f"encoder '{kind}'").tensors, path, kind)


def require_weights(weights: Path | None, kind: str, what: str) -> Path:
    """Return the path of the weights, or raise an `InputError` that says what file is needed."""
    if weights is None:
        raise InputError(f"encoder '{kind}' needs weights: give the path of {what}")
    return weights
