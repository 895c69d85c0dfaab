"""Connectors: trainable networks from an encoder's features to tokens of the language model.

A kind of one's own is a subclass of `Connector` in a plugin (see `mera_ds.plugin`). Weights are
drawn from torch's global generator: seed it before building.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mera_ds.errors import InputError
from mera_ds.model.connectors.base import Connector
from mera_ds.model.connectors.mlp import MlpConnector
from mera_ds.model.connectors.qformer import QFormerConnector
from mera_ds.registry import CONNECTOR, register
from mera_ds.settings import parse, require_known

__all__ = ["CONNECTORS", "Connector", "build_connector", "register_connector"]

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
    """Build a connector, with fresh weights where it is not given any.

    Args:
        kind: a name in `CONNECTORS`.
        options: the kind's own options; see its `Options`.
        feature_dim: width of the encoder's features.
        llm_dim: width of the language model's embeddings.
        weights: what the connector starts from: `qformer` from a BERT (see `load_bert`), `mlp`
            from a LLaVA's or PointLLM's projector (see `load_projector`).

    Raises:
        InputError: on an unknown kind or option, or missing weights.
        DataError: on weights that do not fit.
    """
    require_known(kind, CONNECTORS, "connector kind")
    cls = CONNECTORS[kind]
    parsed = parse(cls.Options, options, f"connector '{kind}'")
    return cls(parsed, feature_dim, llm_dim, weights)
