"""The network of BEATs (Chen et al. 2023): patches of a log-mel spectrogram, 12 transformer layers.

Written from the architecture, with the official files' names of parameters. Shape letters: B
clips, T frames, N tokens, D width, H heads, Q queries, K keys.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mera_ds.errors import InputError
from mera_ds.model.encoders.fbank import MEL_BANDS

MEAN = 15.41663
DEVIATION = 6.55582
"""Of the training data's log-mel values; what is divided by is twice the deviation."""

LARGEST_BIAS = 2**27
"""Most elements of an attention bias at once (512 MB in fp32); larger batches go in parts."""

GATE_WIDTH = 8


@dataclass(frozen=True, kw_only=True)
class BeatsConfig:
    """What the features depend on in an official file's `cfg`; defaults are the official code's."""

    input_patch_size: int = -1
    embed_dim: int = 512
    conv_bias: bool = False
    encoder_layers: int = 12
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_attention_heads: int = 12
    activation_fn: str = "gelu"
    layer_norm_first: bool = False
    deep_norm: bool = False
    conv_pos: int = 128
    conv_pos_groups: int = 16
    relative_position_embedding: bool = False
    num_buckets: int = 320
    max_distance: int = 1280
    gru_rel_pos: bool = False

    def __post_init__(self) -> None:
        """Check what the network can be built with."""
        if self.input_patch_size < 1 or MEL_BANDS % self.input_patch_size:
            raise InputError(
                f"input_patch_size is {self.input_patch_size}; it must divide {MEL_BANDS}"
            )
        if self.activation_fn != "gelu":
            raise InputError(f"activation_fn is '{self.activation_fn}'; only 'gelu' is known")
        if self.encoder_embed_dim % self.encoder_attention_heads:
            raise InputError(
                f"encoder_embed_dim is {self.encoder_embed_dim}; it must be a multiple of "
                f"encoder_attention_heads={self.encoder_attention_heads}"
            )
        if self.num_buckets < 4 or self.num_buckets % 4:
            raise InputError(f"num_buckets is {self.num_buckets}; it must be a multiple of 4")
        if self.max_distance <= self.num_buckets // 4:
            raise InputError(
                f"max_distance is {self.max_distance}; it must be above num_buckets / 4"
            )

    def num_tokens(self, frames: int) -> int:
        """Return how many tokens a spectrogram of `frames` frames gives; the rest is dropped."""
        return frames // self.input_patch_size * (MEL_BANDS // self.input_patch_size)


def reduce_mask(padding: Tensor, count: int) -> Tensor:
    """Shrink a padding mask (B, n), True on padding, to (B, count).

    Its last n mod `count` entries are dropped; the rest falls into `count` equal groups, and a
    group is padding if all of it is.
    """
    kept = padding.shape[1] - padding.shape[1] % count
    return padding[:, :kept].unflatten(1, (count, -1)).all(dim=2)


def relative_buckets(relative: Tensor, config: BeatsConfig) -> Tensor:
    """Map relative positions (key - query) to buckets, as T5 does: half of them for each sign.

    Up to a quarter of `num_buckets` every distance has its own; from there to `max_distance` they
    grow logarithmically, and what is farther shares the last one.
    """
    half = config.num_buckets // 2
    exact = half // 2
    distance = relative.abs()
    scale = math.log(config.max_distance / exact)
    growth = torch.log(distance.clamp(min=1).float() / exact) / scale * (half - exact)
    far = (exact + growth.long()).clamp(max=half - 1)
    return half * (relative > 0).long() + torch.where(distance < exact, distance, far)


class PositionalConv(nn.Module):
    """Convolution over time whose taps are vectors of learned length (weight normalisation)."""

    def __init__(self, width: int, taps: int, groups: int) -> None:
        super().__init__()
        self.taps, self.groups = taps, groups
        self.weight_g = nn.Parameter(torch.ones(1, 1, taps))
        self.weight_v = nn.Parameter(torch.randn(width, width // groups, taps))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        norm = self.weight_v.float().norm(dim=(0, 1), keepdim=True)
        weight = (self.weight_v.float() * (self.weight_g.float() / norm)).to(hidden.dtype)
        mixed = F.conv1d(
            hidden.transpose(1, 2), weight, self.bias, padding=self.taps // 2, groups=self.groups
        )
        # An even kernel gives one step too many.
        return F.gelu(mixed[..., : hidden.shape[1]]).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention with a relative position bias that each query weighs by its own gate."""

    def __init__(self, config: BeatsConfig, position: nn.Embedding | None) -> None:
        super().__init__()
        width, self.heads = config.encoder_embed_dim, config.encoder_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.gated = config.gru_rel_pos and position is not None
        if position is not None:
            self.relative_attention_bias = position
        if config.gru_rel_pos:
            self.grep_linear = nn.Linear(width // self.heads, GATE_WIDTH)
            self.grep_a = nn.Parameter(torch.ones(1, self.heads, 1, 1))

    def forward(self, hidden: Tensor, position: Tensor | None, padding: Tensor | None) -> Tensor:
        """(B, N, D) -> (B, N, D).

        Args:
            hidden: (B, N, D).
            position: the bias before its gate (H, Q, K).
            padding: (B, N) bool, True on tokens that no query may look at.
        """
        split = (self.heads, hidden.shape[2] // self.heads)
        query, key, value = (
            project(hidden).unflatten(2, split).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        step = max(LARGEST_BIAS // (self.heads * hidden.shape[1] ** 2), 1)
        parts = []
        for first in range(0, len(hidden), step):
            part = slice(first, first + step)
            bias = self._bias(query[part], position, None if padding is None else padding[part])
            parts.append(F.scaled_dot_product_attention(query[part], key[part], value[part], bias))
        return self.out_proj(torch.cat(parts).transpose(1, 2).flatten(2))

    def _bias(
        self, query: Tensor, position: Tensor | None, padding: Tensor | None
    ) -> Tensor | None:
        """Return what is added to the scores, broadcastable to (B, H, Q, K), or None."""
        bias = None if position is None else position[None].to(query.dtype)
        if bias is not None and self.gated:
            bias = self._gate(query) * bias
        if padding is None:
            return bias
        if bias is None:
            bias = query.new_zeros(1, 1, 1, 1)
        return bias.masked_fill(padding[:, None, None, :], -math.inf)

    def _gate(self, query: Tensor) -> Tensor:
        """Return each query's factor (B, H, Q, 1); `query` is not scaled."""
        sums = self.grep_linear(query).unflatten(3, (2, GATE_WIDTH // 2)).sum(dim=4)
        update, reset = torch.sigmoid(sums).chunk(2, dim=3)
        return update * (reset * self.grep_a - 1) + 2


class Layer(nn.Module):
    """Attention and feed-forward part; post-norm with the residual scaled up (deep norm)."""

    def __init__(self, config: BeatsConfig, position: nn.Embedding | None) -> None:
        super().__init__()
        width, inner = config.encoder_embed_dim, config.encoder_ffn_embed_dim
        self.self_attn = Attention(config, position)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.norm_first = config.layer_norm_first
        self.alpha = (2 * config.encoder_layers) ** 0.25 if config.deep_norm else 1.0

    def forward(self, hidden: Tensor, position: Tensor | None, padding: Tensor | None) -> Tensor:
        """(B, N, D) -> (B, N, D); see `Attention`."""
        if self.norm_first:
            normed = self.self_attn_layer_norm(hidden)
            hidden = hidden + self.self_attn(normed, position, padding)
            return hidden + self._feed_forward(self.final_layer_norm(hidden))
        seen = self.self_attn(hidden, position, padding)
        hidden = self.self_attn_layer_norm(self.alpha * hidden + seen)
        return self.final_layer_norm(self.alpha * hidden + self._feed_forward(hidden))

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden)))


class Transformer(nn.Module):
    """Positional convolution and layers; all of them use the first one's position bias."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.config = config
        self.pos_conv = nn.Sequential(
            PositionalConv(width, config.conv_pos, config.conv_pos_groups)
        )
        self.layer_norm = nn.LayerNorm(width)
        position = None
        if config.relative_position_embedding:
            position = nn.Embedding(config.num_buckets, config.encoder_attention_heads)
        layers = (Layer(config, position) for _ in range(config.encoder_layers))
        self.layers: Any = nn.ModuleList(layers)

    def forward(self, hidden: Tensor, padding: Tensor | None) -> Tensor:
        """(B, N, D) -> (B, N, D); `padding` (B, N) is True on tokens that don't count."""
        if padding is not None:
            hidden = hidden.masked_fill(padding[..., None], 0)
        hidden = hidden + self.pos_conv(hidden)
        if not self.config.layer_norm_first:
            hidden = self.layer_norm(hidden)
        position = self._position_bias(hidden.shape[1])
        for layer in self.layers:
            hidden = layer(hidden, position, padding)
        return self.layer_norm(hidden) if self.config.layer_norm_first else hidden

    def _position_bias(self, count: int) -> Tensor | None:
        """Return the bias (H, Q, K) of `count` tokens."""
        if not self.config.relative_position_embedding:
            return None
        table = self.layers[0].self_attn.relative_attention_bias.weight
        place = torch.arange(count, device=table.device)
        distances = torch.arange(1 - count, count, device=table.device)
        biases = table[relative_buckets(distances, self.config)].T
        return biases[:, place[None, :] - place[:, None] + count - 1]


class BeatsNetwork(nn.Module):
    """The whole network: 250 tensors in the official file, 90,311,792 parameters."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        self.config = config
        patch, width = config.input_patch_size, config.encoder_embed_dim
        self.patch_embedding = nn.Conv2d(
            1, config.embed_dim, patch, stride=patch, bias=config.conv_bias
        )
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        self.post_extract_proj: nn.Module = nn.Identity()
        if config.embed_dim != width:
            self.post_extract_proj = nn.Linear(config.embed_dim, width)
        self.encoder = Transformer(config)

    def forward(self, logs: Tensor, padding: Tensor | None) -> Tensor:
        """Return tokens (B, N, D), those of one time patch from the lowest band to the highest.

        Args:
            logs: log-mel values (B, T, 128), fp32; N = T // 16 · 8.
            padding: (B, N) bool, True on tokens that don't count.
        """
        normal = (logs - MEAN) / (2 * DEVIATION)
        patches = self.patch_embedding(normal[:, None].to(self.patch_embedding.weight.dtype))
        tokens = self.layer_norm(patches.flatten(2).transpose(1, 2))
        return self.encoder(self.post_extract_proj(tokens), padding)
