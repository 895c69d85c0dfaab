"""What every connector is, and the norms that can stand in front of one.

Shape letters: B media, N feature tokens, K tokens for the language model, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mera_ds.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ConnectorOptions:
    """Options of every kind."""

    norm: Literal["none", "layer", "data"] = "none"
    """What stands in front, for encoders whose features are not normalised: a LayerNorm per token,
    or a standardisation per channel with the mean and deviation of training data."""
    output_rms: float | None = None
    """Scale the last layer so that fresh tokens have this root mean square for features of unit
    variance; that of the language model's embeddings is a good choice. None: PyTorch's scale."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.output_rms is not None and self.output_rms <= 0:
            raise InputError(f"output_rms is {self.output_rms}; it must be positive")


def require_positive(**values: int) -> None:
    """Raise `InputError` naming the first value below 1."""
    for name, value in values.items():
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")


class ChannelNorm(nn.Module):
    """Subtracts a fixed mean and divides by a fixed deviation, per channel.

    Features of convolutional encoders are far from zero on average; with the mean taken off, a
    fresh connector learns several times faster than behind a LayerNorm.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("deviation", torch.ones(feature_dim))

    @torch.no_grad()
    def fit(self, values: Tensor) -> None:
        """Take the statistics of features (M, D); dead channels keep a small deviation."""
        self.mean.copy_(values.mean(dim=0))
        spread = values.std(dim=0, unbiased=False)
        self.deviation.copy_(spread.clamp(min=1e-2 * float(spread.mean()) + 1e-6))

    def forward(self, values: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        normal = (values.float() - self.mean.float()) / self.deviation.float()
        return normal.to(values.dtype)  # the engine may leave buffers in fp32


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda feature_dim: nn.Identity(),
    "layer": nn.LayerNorm,
    "data": ChannelNorm,
}


class Connector(nn.Module):
    """Maps features (B, N, D_encoder) to tokens (B, K, D_llm)."""

    Options: ClassVar[type[Any]]
    feature_dim: int

    def __init__(self, options: Any, feature_dim: int, llm_dim: int, weights: Path | None) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.norm = NORMS[options.norm](feature_dim)

    @property
    def fits_data(self) -> bool:
        """Whether `fit` changes anything; a kind with a `fit` of its own says so here."""
        return isinstance(self.norm, ChannelNorm)

    def fit(self, values: Tensor, mask: Tensor) -> None:
        """Prepare a fresh connector for real features, if the option `norm: data` asks for it.

        Args:
            values: features of training media (M, N, D_encoder).
            mask: (M, N) bool, True on real feature tokens.
        """
        if isinstance(self.norm, ChannelNorm):
            self.norm.fit(values[mask])

    def num_tokens(self, n_features: int) -> int:
        """Return K for N = `n_features`."""
        raise NotImplementedError

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """Return tokens (B, K, D_llm).

        Args:
            values: features (B, N, D_encoder).
            mask: (B, N) bool, True on real feature tokens; the others have no influence.
        """
        raise NotImplementedError

    def token_mask(self, mask: Tensor) -> Tensor:
        """Return which of the K tokens are real (B, K), for a mask (B, N) of real features.

        The mask may be on another device than the connector; the answer is where it is.
        """
        raise NotImplementedError

    @torch.no_grad()
    def _scale_output(self, last: nn.Linear, rms: float | None) -> None:
        """Rescale the last layer, so that standard normal features give tokens of this RMS."""
        if rms is None:
            return
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(16, 16, self.feature_dim, generator=generator)
        self.eval()
        tokens = self(values, torch.ones(values.shape[:2], dtype=torch.bool))
        self.train()
        factor = rms / tokens.square().mean().sqrt()
        last.weight.mul_(factor)
        last.bias.mul_(factor)
