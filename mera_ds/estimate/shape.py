"""The backbone's sizes, from its `config.json`, and what follows from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mera_ds.doctor.backbone import EXPECTED
from mera_ds.errors import DataError, InputError
from mera_ds.files import read_json


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama kind: L layers of width D, MLPs of width I, a vocabulary of V."""

    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    head_width: int
    vocabulary: int
    tied: bool

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of each linear layer of a block: q, k, v, o, gate, up, down."""
        query, key = self.heads * self.head_width, self.key_heads * self.head_width
        attention = ((self.width, query), (self.width, key), (self.width, key), (query, self.width))
        mlp = ((self.width, self.inner), (self.width, self.inner), (self.inner, self.width))
        return (*attention, *mlp)

    @property
    def linear(self) -> int:
        """Parameters of all blocks' linear layers."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def embedding(self) -> int:
        """Parameters of the input embedding, and of an output head of its own."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """All parameters, norms included."""
        norms = (2 * self.layers + 1) * self.width
        return self.linear + norms + self.embedding * (1 if self.tied else 2)

    def lora(self, rank: int) -> int:
        """Parameters of LoRA factors on all linear layers of the blocks."""
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in self.linears)


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Return the sizes that an HF configuration states.

    Raises:
        KeyError: if it lacks one.
    """
    heads = int(config["num_attention_heads"])
    width = int(config["hidden_size"])
    return Shape(
        layers=int(config["num_hidden_layers"]),
        width=width,
        inner=int(config["intermediate_size"]),
        heads=heads,
        key_heads=int(config.get("num_key_value_heads") or heads),
        head_width=int(config.get("head_dim") or width // heads),
        vocabulary=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def read_shape(folder: Path) -> Shape:
    """Return the sizes of the backbone in a folder, or of the one known by that folder's name.

    Raises:
        InputError: if there is no `config.json` and the name is unknown.
        DataError: if it describes no decoder of this kind.
    """
    path = folder / "config.json"
    config = read_json(path) if path.exists() else EXPECTED.get(folder.name.lower())
    if config is None:
        raise InputError(f"{path} is missing, so the backbone's size is not known")
    try:
        return shape_of(config)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} does not state the size of a decoder: {error}") from None
