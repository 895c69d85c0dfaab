"""The token-count contract, checked before the first step.

An encoder states its longest output (`max_tokens`) and a connector how many tokens it makes of N
features (`num_tokens`). One real sample of every modality is sent through both; and the longest
samples are laid out, so that none is found too long after hours.
"""

from collections.abc import Mapping

import numpy as np
import torch

from mera_ds.batch import Sample
from mera_ds.data.loader import MixturePart
from mera_ds.errors import DataError, InputError
from mera_ds.model.connectors import Connector
from mera_ds.model.encoders import Encoder
from mera_ds.model.mllm import MultimodalLM

LONGEST = 256
"""How many texts of each modality and task, the longest in characters, are counted in tokens."""


def check_token_counts(
    model: MultimodalLM, mixture: Mapping[str, MixturePart], max_length: int
) -> None:
    """Compare what encoders and connectors state with what they do, and rows with their limit.

    Args:
        model: with the connectors and encoders of the mixture's modalities.
        mixture: the phase's data.
        max_length: longest row in tokens (`prompt.max_length`).

    Raises:
        DataError: if an encoder or connector gives another number or width of tokens than it
            states, naming it, both numbers and the sample.
        InputError: if a row would be too long, saying by how much.
    """
    for modality, part in mixture.items():
        if not part.units:
            continue
        encoder, connector = model.encoders[modality], model.connectors[modality]
        assert isinstance(connector, Connector)
        _check_counts(model, encoder, connector, part.reader.read(part.units[0]))
        media = connector.num_tokens(encoder.max_tokens)
        _check_length(modality, part, media, max_length)


@torch.no_grad()
def _check_counts(
    model: MultimodalLM, encoder: Encoder, connector: Connector, sample: Sample
) -> None:
    where = f"{sample.id}: the encoder '{encoder.kind}' of {sample.modality}"
    features = model.encode([sample])
    _, count, width = features.values.shape
    if not 1 <= count <= encoder.max_tokens:
        raise DataError(
            f"{where} states at most {encoder.max_tokens} tokens (max_tokens) and gave {count}; "
            "correct the encoder, or delete features that an earlier version of it computed"
        )
    if width != encoder.feature_dim:
        raise DataError(
            f"{where} states a width of {encoder.feature_dim} (feature_dim) and gave {width}; "
            "correct the encoder"
        )
    training = connector.training
    connector.eval()
    ready = features.to(model.device, next(connector.parameters()).dtype)
    tokens = connector(ready.values, ready.mask)
    real = connector.token_mask(ready.mask)
    connector.train(training)
    llm_width = model.llm.get_input_embeddings().embedding_dim
    expected = (1, connector.num_tokens(count), llm_width)
    if tuple(tokens.shape) != expected or tuple(real.shape) != expected[:2]:
        raise DataError(
            f"{sample.id}: the connector of {sample.modality} ({type(connector).__name__}) states "
            f"{expected[1]} tokens of width {llm_width} for {count} features (num_tokens) and gave "
            f"{tokens.shape[1]} of width {tokens.shape[2]}, {real.shape[1]} of them in its mask; "
            "correct the connector"
        )


def _check_length(modality: str, part: MixturePart, media_tokens: int, max_length: int) -> None:
    tasks = part.reader.task_codes(part.units)
    lengths = np.asarray(part.lengths)
    texts = {}
    for task in np.unique(tasks):
        places = np.flatnonzero(tasks == task)
        longest_first = places[np.argsort(-lengths[places], kind="stable")]
        for place in longest_first[:LONGEST].tolist():
            texts[part.ids[place]] = len(part.reader.pieces(part.units[place]))
    longest = max(texts, key=texts.__getitem__)
    length = texts[longest] + media_tokens
    if length > max_length:
        raise InputError(
            f"{longest} has {texts[longest]} text tokens and its {modality} up to "
            f"{media_tokens}: together {length}, {length - max_length} more than "
            f"prompt.max_length={max_length}; raise it, or take fewer tokens per medium"
        )
