"""BLIP-2's Q-Former: learned queries that look at the features."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from mera_ds.errors import DataError, InputError
from mera_ds.model.connectors.base import Connector, ConnectorOptions, require_positive
from mera_ds.model.official import read_official

FILES = ("model.safetensors", "pytorch_model.bin")
"""A BERT's weights in its folder."""


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
        # What `fit` takes off the tokens; without `norm: data` the connector is BLIP-2's own.
        self.offsets = None
        if options.norm == "data":
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
        if self.offsets is None or self._output_rms is None:
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
        tokens: Tensor = self.project(hidden)
        return tokens if self.offsets is None else tokens + self.offsets


@torch.no_grad()
def load_bert(qformer: nn.Module, weights: Path) -> None:
    """Copy self-attention, feed-forward and embedding-norm weights of a BERT into a Q-Former.

    Args:
        qformer: a `Blip2QFormerModel`; of a deeper BERT it takes the first layers.
        weights: file of a BERT (safetensors, or `pytorch_model.bin`), or a folder with one.

    Raises:
        InputError: if the file does not exist.
        DataError: if a tensor is missing or has another shape than the options ask for.
    """
    path = weights
    if weights.is_dir():
        found = [weights / name for name in FILES if (weights / name).is_file()]
        path = found[0] if found else weights / FILES[0]
    tensors = read_official(path, "connector 'qformer'").tensors
    bert = {_bert_name(name): tensor for name, tensor in tensors.items()}
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
