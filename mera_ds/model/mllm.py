"""The multimodal language model: frozen encoders → connectors → shared backbone.

Shape letters: B samples, T positions, N feature tokens, K connector tokens, D backbone width,
L label positions, V vocabulary.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from mera_ds.batch import Batch, Features, Sample, pad_features
from mera_ds.config import Decode
from mera_ds.errors import DataError, InputError
from mera_ds.model.backbone import generation_ends
from mera_ds.model.connectors import Connector
from mera_ds.model.decoding import StaticDecoder, make_decoder
from mera_ds.model.encoders import Encoder
from mera_ds.model.packing import distinct_media, pack, use_packed_attention


@dataclass(frozen=True)
class Rows:
    """Samples laid out for the backbone."""

    embeddings: Tensor
    """(B, T, D)"""
    attention: Tensor
    """(B, T) 1 on real positions, 0 on padding."""
    label_positions: Tensor
    """(L, 2) row and position whose hidden state predicts the label."""
    labels: Tensor
    """(L,) token ids."""


@dataclass(frozen=True)
class Layout:
    """How samples become rows of the backbone."""

    packed: bool = False
    """All in one row, see `mera_ds.model.packing`; otherwise one row each, padded."""
    shared: bool = False
    """Packed, and texts of one medium share its tokens."""


@dataclass
class Positions:
    """How many positions the backbone has computed, and padded rows would have."""

    computed: int = 0
    padded: int = 0


class MultimodalLM(nn.Module):
    """Backbone, one connector per modality, and the frozen encoders beside them.

    The encoders are not sub-modules: they never train, so no engine has to partition them and no
    checkpoint holds them.
    """

    llm: Any
    """A causal language model of transformers, with LoRA injected or not."""

    def __init__(
        self,
        llm: nn.Module,
        connectors: Mapping[str, Connector],
        encoders: Mapping[str, Encoder],
        max_length: int,
        layout: Layout = Layout(),
    ) -> None:
        super().__init__()
        if layout.packed:
            use_packed_attention(cast(PreTrainedModel, llm), layout.shared)
        self.llm = llm
        self.connectors = nn.ModuleDict(dict(connectors))
        self._encoders = dict(encoders)
        self._max_length = max_length
        self._layout = layout
        self.positions = Positions()
        self._decoders: dict[Decode, StaticDecoder] = {}

    @property
    def encoders(self) -> Mapping[str, Encoder]:
        """The frozen encoders, by modality."""
        return self._encoders

    @property
    def device(self) -> torch.device:
        """Where the backbone computes; its input embedding may lie elsewhere."""
        return self.llm.get_output_embeddings().weight.device

    def _connectors(self) -> Iterable[tuple[str, Connector]]:
        """The connectors in their fixed order."""
        return cast(Iterable[tuple[str, Connector]], self.connectors.items())

    def encode(self, samples: Sequence[Sample]) -> Features:
        """Return the features of the samples' media, from the encoder or as they were stored.

        A medium with several texts among the samples goes through the encoder once.
        """
        if samples[0].encoded:
            return pad_features([sample.media for sample in samples])
        chosen, places = distinct_media(samples)
        with torch.no_grad():
            encoder = self._encoders[samples[0].modality]
            found = encoder([samples[number].media for number in chosen])
            features = found.to(found.values.device, encoder.feature_dtype)
        if len(chosen) == len(samples):
            return features
        return Features(features.values[places], features.mask[places])

    def forward(self, batch: Batch) -> Tensor:
        """Return the summed cross-entropy of the batch's counted label positions, in fp32.

        Every connector is called, in the same order whatever the modality; the others see zeros
        and contribute 0. DeepSpeed's ZeRO would otherwise average wrongly or apply old gradients.
        """
        if self._layout.packed:
            hidden_TD, positions, labels, nothing = self._packed(batch)
        else:
            hidden_TD, positions, labels, nothing = self._padded(batch)
        logits_LV = self.llm.get_output_embeddings()(hidden_TD[positions]).float()
        loss = functional.cross_entropy(logits_LV, labels, reduction="sum")
        return loss + nothing + 0.0 * hidden_TD[-1].sum().float()

    def _padded(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return hidden states (B · T, D) of padded rows, label positions, labels, and a 0."""
        tokens, nothing = self._connect(batch.modality, self.encode(batch.samples))
        rows = self._lay_out(batch.samples, tokens, batch.counted)
        hidden_BTD = self._hidden(rows)
        width = hidden_BTD.shape[1]
        self._count(rows.attention.numel(), rows.attention.numel())
        positions = rows.label_positions[:, 0] * width + rows.label_positions[:, 1]
        return hidden_BTD.flatten(0, 1), positions, rows.labels, nothing

    def _packed(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return hidden states (T, D) of a packed row, label positions, labels, and a 0."""
        samples = batch.samples
        everyone = list(range(len(samples)))
        chosen, places = distinct_media(samples) if self._layout.shared else (everyone, everyone)
        features = self.encode([samples[number] for number in chosen])
        tokens, nothing = self._connect(batch.modality, features)
        media = [tokens[place] for place in places]
        for sample, tokens_KD in zip(samples, media, strict=True):
            self._check_length(sample.text_tokens + len(tokens_KD), sample)
        embed = self.llm.get_input_embeddings()
        row = pack(samples, media, batch.counted, self._layout.shared, embed)
        hidden_BTD = self.llm.base_model(
            inputs_embeds=row.embeddings,
            position_ids=row.position_ids,
            use_cache=False,
            **row.attention_arguments(self.llm.config._attn_implementation),
        ).last_hidden_state
        self._count(row.position_ids.numel(), row.padded)
        return hidden_BTD[0], row.label_positions, row.labels, nothing

    def take_positions(self) -> Positions:
        """Return what was counted since the last call."""
        found, self.positions = self.positions, Positions()
        return found

    def _count(self, computed: int, padded: int) -> None:
        self.positions.computed += computed
        self.positions.padded += padded

    def _connect(self, modality: str, features: Features) -> tuple[list[Tensor], Tensor]:
        """Return each medium's tokens (K_b, D), and a scalar 0 that depends on all connectors."""
        tokens: list[Tensor] = []
        nothing = torch.zeros((), device=self.device)
        for name, connector in self._connectors():
            dtype = next(connector.parameters()).dtype
            if name == modality:
                ready = features.to(self.device, dtype)
                padded_BKD = connector(ready.values, ready.mask)
                # The mask of stored features is on the host: nobody has to wait for the device.
                tokens = _real_tokens(padded_BKD, connector.token_mask(features.mask))
            else:
                zeros = torch.zeros(1, 1, connector.feature_dim, device=self.device, dtype=dtype)
                seen = torch.ones(1, 1, dtype=torch.bool, device=self.device)
                nothing = nothing + 0.0 * connector(zeros, seen).float().sum()
        return tokens, nothing

    def _lay_out(
        self, samples: Sequence[Sample], tokens: Sequence[Tensor], counted: Sequence[bool]
    ) -> Rows:
        """Put prefix, media tokens, suffix and answer of each sample into one right-padded row.

        The device is not waited for.
        """
        lengths = [one.text_tokens + len(media) for one, media in zip(samples, tokens, strict=True)]
        ids: list[int] = []
        sizes: list[int] = []
        positions: list[tuple[int, int]] = []
        labels: list[int] = []
        for number, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            self._check_length(length, sample)
            tail = (*sample.suffix_ids, *sample.answer_ids)
            ids += (*sample.prefix_ids, *tail)
            sizes += (len(sample.prefix_ids), len(tail))
            if counted[number]:
                if not sample.answer_ids:
                    raise DataError(f"{sample.id} has no token to learn from; it has no answer")
                first = length - len(sample.answer_ids)
                positions += [(number, place - 1) for place in range(first, length)]
                labels += sample.answer_ids
        embed = self.llm.get_input_embeddings()
        texts_TD = embed(torch.tensor(ids, dtype=torch.long, device=self.device))
        texts = iter(texts_TD.split(sizes))
        nothing_TD = texts_TD.new_zeros(max(lengths), texts_TD.shape[1])
        pieces: list[Tensor] = []
        for length, media_KD in zip(lengths, tokens, strict=True):
            padding = nothing_TD[length:]
            pieces += (next(texts), media_KD.to(texts_TD.dtype), next(texts), padding)
        padded_BTD = torch.cat(pieces).view(len(samples), *nothing_TD.shape)
        ends = torch.tensor(lengths, device=self.device)
        attention = torch.arange(max(lengths), device=self.device)[None] < ends[:, None]
        return Rows(
            padded_BTD,
            attention.long(),
            torch.tensor(positions, dtype=torch.long, device=self.device).reshape(-1, 2),
            torch.tensor(labels, dtype=torch.long, device=self.device),
        )

    def _check_length(self, length: int, sample: Sample) -> None:
        if length > self._max_length:
            raise InputError(
                f"{sample.id} is {length} tokens long with its medium, more than "
                f"prompt.max_length={self._max_length}; raise it or shorten the text"
            )

    def _hidden(self, rows: Rows) -> Tensor:
        """Return the backbone's last hidden states (B, T, D).

        Padding is on the right, where no real position looks, so the mask is left out: attention is
        faster without one.
        """
        return self.llm.base_model(inputs_embeds=rows.embeddings, use_cache=False).last_hidden_state

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The backbone's transformer blocks."""
        return cast(Sequence[nn.Module], self.llm.base_model.layers)

    @torch.no_grad()
    def block_states(self, batch: Batch) -> Tensor:
        """Return the hidden states behind each block at the R real positions, (blocks, R, D)."""
        tokens, _ = self._connect(batch.modality, self.encode(batch.samples))
        rows = self._lay_out(batch.samples, tokens, batch.counted)
        states = self.llm.base_model(
            inputs_embeds=rows.embeddings,
            attention_mask=rows.attention,
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states[1:]
        return torch.stack([state[rows.attention.bool()] for state in states])

    @torch.no_grad()
    def generate(
        self,
        samples: Sequence[Sample],
        max_new_tokens: int,
        tokenizer: Any,
        end_ids: Collection[int] = (),
        decode: Decode = "eager",
    ) -> list[str]:
        """Continue the samples greedily; return the texts up to the first end token.

        Args:
            samples: of one modality, without answers.
            max_new_tokens: most tokens per text.
            tokenizer: gives its end token and decodes.
            end_ids: further tokens that end a text, such as the end of an assistant's turn; those
                of the backbone's generation config count as well.
            decode: see `execution.decode`; all ways say the same, to rounding.
        """
        tokens, _ = self._connect(samples[0].modality, self.encode(samples))
        rows = self._lay_out(samples, tokens, [False] * len(samples))
        count, width = rows.attention.shape
        numbers = torch.arange(max(count, width), device=self.device)
        places_BT = (numbers[:width] + rows.attention.sum(dim=1, keepdim=True)) % width
        embeddings_BTD = rows.embeddings[numbers[:count, None], places_BT]
        ends = {tokenizer.eos_token_id, *end_ids, *generation_ends(self.llm)}
        ids_BT = self._continue(
            embeddings_BTD, rows.attention.flip(1), max_new_tokens, ends, decode
        )
        said = [list(takewhile(lambda number: number not in ends, row)) for row in ids_BT.tolist()]
        return [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]

    def _continue(
        self,
        embeddings_BTD: Tensor,
        attention_BT: Tensor,
        max_new_tokens: int,
        ends: Collection[int],
        decode: Decode,
    ) -> Tensor:
        """Return the token ids (B, T') that follow rows padded on the left."""
        if decode != "eager":
            if decode not in self._decoders:
                self._decoders[decode] = make_decoder(self.llm, decode, len(attention_BT))
            return self._decoders[decode](embeddings_BTD, attention_BT, max_new_tokens, ends)
        return self.llm.generate(
            inputs_embeds=embeddings_BTD,
            attention_mask=attention_BT,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=sorted(ends),
            pad_token_id=min(ends),
        )


def _real_tokens(padded_BKD: Tensor, real_BK: Tensor) -> list[Tensor]:
    """Return each medium's real tokens (K_b, D)."""
    counts = real_BK.sum(dim=1).tolist()
    if min(counts) == real_BK.shape[1]:
        return list(padded_BKD.unbind())
    places = real_BK.flatten().nonzero().squeeze(1).to(padded_BKD.device)
    return list(padded_BKD.flatten(0, 1).index_select(0, places).split(counts))
