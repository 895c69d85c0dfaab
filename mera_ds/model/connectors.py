"""Connectors: trainable networks from an encoder's features to tokens of the language model.

Shape letters: B media, N feature tokens, K tokens for the language model, D width. Weights are
drawn from torch's global generator: seed it before building.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from mera_ds.errors import DataError, InputError
from mera_ds.registry import CONNECTOR, register
from mera_ds.settings import parse, require_known


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


@dataclass(frozen=True, kw_only=True)
class MlpOptions(ConnectorOptions):
    """Options of `mlp`."""

    depth: int = 2
    """Number of linear layers: LLaVA's `mlp2x_gelu` has 2."""
    hidden: int | None = None
    """Width between them; None: that of the language model."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require_positive(depth=self.depth, hidden=1 if self.hidden is None else self.hidden)


@dataclass(frozen=True, kw_only=True)
class QFormerOptions(ConnectorOptions):
    """Options of `qformer`; the defaults are BLIP-2's."""

    num_queries: int = 32
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    cross_attention_frequency: int = 2
    """Every so many layers, from the first on, look at the features."""
    dropout: float = 0.1

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require_positive(
            num_queries=self.num_queries,
            hidden=self.hidden,
            layers=self.layers,
            heads=self.heads,
            cross_attention_frequency=self.cross_attention_frequency,
        )
        if self.hidden % self.heads:
            raise InputError(
                f"hidden is {self.hidden}; it must be a multiple of heads={self.heads}"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; it must be in [0, 1)")


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
        """Return which of the K tokens are real (B, K), for a mask (B, N) of real features."""
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


class MlpConnector(Connector):
    """Kind `mlp`: linear layers with exact GELU between them, one token per feature token.

    Feature tokens outside the mask become zero vectors.
    """

    Options = MlpOptions

    def __init__(
        self, options: MlpOptions, feature_dim: int, llm_dim: int, weights: Path | None
    ) -> None:
        super().__init__(options, feature_dim, llm_dim, weights)
        if weights is not None:
            raise InputError(f"connector 'mlp' takes no weights to start from; remove {weights}")
        widths = [feature_dim, *[options.hidden or llm_dim] * (options.depth - 1), llm_dim]
        linears = [nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths)]
        layers: list[nn.Module] = [linears[0]]
        for linear in linears[1:]:
            layers += [nn.GELU(), linear]
        self.layers = nn.Sequential(*layers)
        self._scale_output(linears[-1], options.output_rms)

    def num_tokens(self, n_features: int) -> int:
        """One token per feature token."""
        return n_features

    def token_mask(self, mask: Tensor) -> Tensor:
        """A token is real if its feature token is."""
        return mask

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """(B, N, D_encoder), (B, N) -> (B, N, D_llm)."""
        tokens: Tensor = self.layers(self.norm(values))
        return tokens * mask[..., None]


class QFormerConnector(Connector):
    """Kind `qformer`: learned queries that look at the features, then a linear layer.

    The query branch of BLIP-2's Q-Former alone (Li et al. 2023): no text embeddings and no text
    feed-forward layers. It can start from a BERT of the same width, as in the paper (Appendix B):
    self-attention and feed-forward layers are copied, cross-attention is new.
    """

    Options = QFormerOptions

    def __init__(
        self, options: QFormerOptions, feature_dim: int, llm_dim: int, weights: Path | None
    ) -> None:
        super().__init__(options, feature_dim, llm_dim, weights)
        self.queries = nn.Parameter(torch.empty(1, options.num_queries, options.hidden))
        nn.init.normal_(self.queries, std=0.02)
        config = Blip2QFormerConfig(
            hidden_size=options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            intermediate_size=4 * options.hidden,
            hidden_dropout_prob=options.dropout,
            attention_probs_dropout_prob=options.dropout,
            cross_attention_frequency=options.cross_attention_frequency,
            encoder_hidden_size=feature_dim,
            use_qformer_text_input=False,
        )
        self.qformer = Blip2QFormerModel(config)
        if weights is not None:
            load_bert(self.qformer, weights)
        self.project = nn.Linear(options.hidden, llm_dim)
        self.offsets = nn.Parameter(torch.zeros(options.num_queries, llm_dim))
        self._output_rms = options.output_rms
        self._scale_output(self.project, options.output_rms)

    @torch.no_grad()
    def fit(self, values: Tensor, mask: Tensor) -> None:
        """Fit the norm, then take what all media have in common off the tokens.

        Fresh queries hardly differ between media: nine tenths of a token is constant, and a
        language model behind it sees one and the same medium. With the constant taken off and the
        rest scaled to `output_rms`, learning starts at once.
        """
        super().fit(values, mask)
        if not isinstance(self.norm, ChannelNorm) or self._output_rms is None:
            return
        training = self.training
        self.eval()
        tokens_MKD = self(values, mask)
        self.train(training)
        mean_KD = tokens_MKD.mean(dim=0)
        factor = self._output_rms / (tokens_MKD - mean_KD).square().mean().sqrt()
        self.project.weight.mul_(factor)
        self.project.bias.mul_(factor)
        self.offsets.copy_(-factor * mean_KD)

    def num_tokens(self, n_features: int) -> int:
        """One token per query, however many features there are."""
        return self.queries.shape[1]

    def token_mask(self, mask: Tensor) -> Tensor:
        """All tokens are real."""
        return mask.new_ones(len(mask), self.queries.shape[1])

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """(B, N, D_encoder), (B, N) -> (B, num_queries, D_llm)."""
        # A medium without a real token looks at its padding: a softmax over nothing is not finite.
        visible = mask | ~mask.any(dim=1, keepdim=True)
        hidden = self.qformer(
            query_embeds=self.queries.expand(len(values), -1, -1),
            encoder_hidden_states=self.norm(values),
            encoder_attention_mask=visible,
        ).last_hidden_state
        tokens: Tensor = self.project(hidden) + self.offsets
        return tokens


@torch.no_grad()
def load_bert(qformer: nn.Module, weights: Path) -> None:
    """Copy self-attention, feed-forward and embedding-norm weights of a BERT into a Q-Former.

    Args:
        qformer: a `Blip2QFormerModel`; of a deeper BERT it takes the first layers.
        weights: safetensors file of a BERT, or a folder with `model.safetensors`.

    Raises:
        InputError: if the file does not exist.
        DataError: if a tensor is missing or has another shape than the options ask for.
    """
    path = weights / "model.safetensors" if weights.is_dir() else weights
    if not path.is_file():
        raise InputError(f"connector 'qformer': weights {path} do not exist")
    try:
        bert = {_bert_name(name): tensor for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a readable safetensors file: {error}") from None
    for name, tensor in qformer.state_dict().items():
        if "crossattention" in name:
            continue
        source = _name_in_bert(name)
        if source not in bert:
            raise DataError(f"{path} has no tensor '{source}'; it needs a BERT with enough layers")
        if bert[source].shape != tensor.shape:
            raise DataError(
                f"{path}: '{source}' has shape {tuple(bert[source].shape)}, the options ask for "
                f"{tuple(tensor.shape)}; set the connector's 'hidden' to the BERT's width"
            )
        tensor.copy_(bert[source])


def _bert_name(name: str) -> str:
    """Undo the variations of published files: a `bert.` prefix, TensorFlow's names of norms."""
    return name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")


def _name_in_bert(name: str) -> str:
    if name.startswith("layernorm."):
        return name.replace("layernorm.", "embeddings.LayerNorm.")
    return (
        name.replace(".attention.attention.", ".attention.self.")
        .replace(".intermediate_query.", ".intermediate.")
        .replace(".output_query.", ".output.")
    )


CONNECTORS: dict[str, type[Connector]] = {"mlp": MlpConnector, "qformer": QFormerConnector}


def register_connector(kind: str, connector: type[Connector]) -> None:
    """Add a plugin's connector: `Options`, `num_tokens`, `token_mask` and `forward`.

    Raises:
        InputError: if the name is taken, or the class is no connector.
    """
    if not (isinstance(connector, type) and issubclass(connector, Connector)):
        raise InputError(f"connector kind '{kind}': {connector!r} is no subclass of Connector")
    if not hasattr(connector, "Options"):
        raise InputError(f"connector kind '{kind}': {connector.__name__} has no 'Options'")
    register(CONNECTOR, CONNECTORS, kind, connector)


def build_connector(
    kind: str,
    options: Mapping[str, Any],
    feature_dim: int,
    llm_dim: int,
    weights: Path | None = None,
) -> Connector:
    """Build a connector with fresh weights.

    Args:
        kind: a name in `CONNECTORS`.
        options: the kind's own options; see its `Options`.
        feature_dim: width of the encoder's features.
        llm_dim: width of the language model's embeddings.
        weights: what `qformer` starts from; see `load_bert`.

    Raises:
        InputError: on an unknown kind or option, or weights that are missing or not wanted.
        DataError: on weights that do not fit.
    """
    require_known(kind, CONNECTORS, "connector kind")
    cls = CONNECTORS[kind]
    parsed = parse(cls.Options, options, f"connector '{kind}'")
    return cls(parsed, feature_dim, llm_dim, weights)
