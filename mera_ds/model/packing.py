"""Several samples in one row: layout and attention.

A packed row is a sequence of groups. A group is a trunk with branches behind it: a trunk alone is
one sample; with `shared_prefix`, the trunk is what the samples of one medium have in common (system
prompt, the medium's tokens, instruction) and each branch the rest of one sample. A position sees
its own trunk and branch up to itself, and nothing else, and has the number that it would have in a
row of its own. So every sample's hidden states are those of an unpacked row, to rounding.

Shape letters: T positions, D backbone width, H heads, P trunk positions, S branch positions of a
group, K a medium's tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mera_ds.batch import Sample
from mera_ds.errors import DataError, InputError

GROUPED = "mera_grouped"
"""Name of `grouped_attention` among transformers' attention functions."""
FLASH = "flash_attention_2"


@dataclass(frozen=True)
class Group:
    """One trunk and its branches, one behind the other in a packed row."""

    start: int
    trunk: int
    """Number of its positions, at least 1."""
    branches: tuple[int, ...]
    """Numbers of positions of the branches."""
    mask: Tensor | None
    """(S, P + S) True where a position of a branch sees one of the group; None without branches."""


@dataclass(frozen=True)
class PackedRow:
    """Samples laid out in one row."""

    embeddings: Tensor
    """(1, T, D)"""
    position_ids: Tensor
    """(1, T) a position's number in a row of its own."""
    groups: tuple[Group, ...]
    label_positions: Tensor
    """(L,) position whose hidden state predicts the label."""
    labels: Tensor
    """(L,) token ids."""
    padded: int
    """How many positions the samples would take in padded rows."""

    def attention_arguments(self, implementation: str) -> dict[str, Any]:
        """Return what the backbone's forward takes besides embeddings, for its attention.

        flash-attn gets the lengths of the samples; `grouped_attention` the groups. The mask of
        one element is one that transformers hands on as it is, so that it makes none itself.
        """
        if implementation == FLASH:
            lengths = [group.trunk for group in self.groups]
            ends = torch.tensor([0, *accumulate(lengths)], device=self.embeddings.device)
            ends = ends.to(torch.int32)
            longest = max(lengths)
            return {
                "cu_seq_lens_q": ends,
                "cu_seq_lens_k": ends,
                "max_length_q": longest,
                "max_length_k": longest,
            }
        unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.embeddings.device)
        return {"attention_mask": unused, "groups": self.groups}


def use_packed_attention(llm: PreTrainedModel, shared: bool) -> None:
    """Let a backbone attend within groups: by flash-attn if it has it and nothing is shared.

    Raises:
        InputError: if its attention is neither SDPA nor flash-attn.
    """
    found = llm.config._attn_implementation
    if found not in ("sdpa", FLASH):
        raise InputError(
            f"execution.packing needs backbone.attention sdpa or flash_attention_2, not {found}; "
            "set backbone.attention=auto"
        )
    if found == FLASH and not shared:
        return
    AttentionInterface.register(GROUPED, grouped_attention)
    AttentionMaskInterface.register(GROUPED, sdpa_mask)  # for rows that are not packed
    llm.set_attn_implementation(GROUPED)


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    groups: Sequence[Group] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend within each group; as SDPA where the rows are not packed.

    Args:
        module: the attention layer.
        query: (1, H, T, D / H).
        key: (1, H_kv, T, D / H); `value` likewise.
        attention_mask: of rows that are not packed.
        dropout: of attention weights.
        scaling: factor of the scores.
        groups: of the packed row.
        others: what transformers passes on besides.

    Returns:
        (1, T, H, D / H), and no weights.

    Raises:
        InputError: if a group is longer than the window of a sliding attention.
    """
    if groups is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **others
        )
    _refuse_sliding(groups, others.get("sliding_window"))
    copies = query.shape[1] // key.shape[1]
    attend = functional.scaled_dot_product_attention
    how: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    parts = []
    for group in groups:
        first, middle = group.start, group.start + group.trunk
        q, k, v = (entry[:, :, first:middle] for entry in (query, key, value))
        parts.append(attend(q, k, v, is_causal=True, enable_gqa=copies > 1, **how))
        if group.mask is not None:
            end = middle + sum(group.branches)
            k, v = (repeat_kv(entry[:, :, first:end], copies) for entry in (key, value))
            parts.append(attend(query[:, :, middle:end], k, v, attn_mask=group.mask, **how))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _refuse_sliding(groups: Sequence[Group], window: int | None) -> None:
    longest = max(group.trunk + max(group.branches, default=0) for group in groups)
    if window is not None and longest > window:
        raise InputError(
            f"a row of {longest} tokens is longer than the backbone's attention window of "
            f"{window}, which packed rows do not have; set execution.packing=false and "
            "execution.shared_prefix=false"
        )


def pack(
    samples: Sequence[Sample],
    media: Sequence[Tensor],
    counted: Sequence[bool],
    shared: bool,
    embed: Callable[[Tensor], Tensor],
) -> PackedRow:
    """Lay samples out in one row.

    Args:
        samples: of one micro-batch.
        media: (K_b, D) per sample; the same tensor for samples of one medium, if `shared`.
        counted: whether a sample's answer is learned from.
        shared: whether samples of one medium share a trunk.
        embed: token ids -> embeddings.

    Raises:
        DataError: if a counted sample has no answer.
    """
    builder = _Builder()
    for members in _families(samples) if shared else [[n] for n in range(len(samples))]:
        builder.add([samples[n] for n in members], media[members[0]], [counted[n] for n in members])
    device = media[0].device
    texts_TD = embed(torch.tensor(builder.ids, dtype=torch.long, device=device))
    pieces: list[Tensor] = []
    taken = 0
    for piece in builder.pieces:
        if isinstance(piece, Tensor):
            pieces.append(piece.to(texts_TD.dtype))
        else:
            pieces.append(texts_TD[taken : taken + piece])
            taken += piece
    rows = [one.text_tokens + len(medium) for one, medium in zip(samples, media, strict=True)]
    return PackedRow(
        torch.cat(pieces)[None],
        torch.tensor(builder.positions, device=device)[None],
        tuple(_group(*entry, device) for entry in builder.groups),
        torch.tensor(builder.label_positions, dtype=torch.long, device=device),
        torch.tensor(builder.labels, dtype=torch.long, device=device),
        len(rows) * max(rows),
    )


def distinct_media(samples: Sequence[Sample]) -> tuple[list[int], list[int]]:
    """Return a sample for each distinct medium, and each sample's place among these."""
    firsts: dict[object, int] = {}
    chosen: list[int] = []
    places = []
    for number, sample in enumerate(samples):
        key = number if sample.medium is None else sample.medium
        if key not in firsts:
            firsts[key] = len(chosen)
            chosen.append(number)
        places.append(firsts[key])
    return chosen, places


def _families(samples: Sequence[Sample]) -> list[list[int]]:
    """Return the samples that begin alike: of one medium, with the same ids in front of it."""
    families: dict[object, list[int]] = {}
    for number, sample in enumerate(samples):
        key = number if sample.medium is None else (sample.medium, sample.prefix_ids)
        families.setdefault(key, []).append(number)
    return list(families.values())


def _group(start: int, trunk: int, branches: tuple[int, ...], device: torch.device) -> Group:
    if not branches:
        return Group(start, trunk, branches, None)
    owner = torch.repeat_interleave(torch.tensor(branches))
    size = len(owner)
    own = (owner[:, None] == owner[None]) & torch.ones(size, size, dtype=torch.bool).tril()
    mask = torch.cat([torch.ones(size, trunk, dtype=torch.bool), own], dim=1)
    return Group(start, trunk, branches, mask.to(device))


class _Builder:
    """Collects the groups of a packed row."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        """Token ids of all texts, in order."""
        self.pieces: list[Tensor | int] = []
        """A medium's tokens (K, D), or how many of `ids` come next."""
        self.positions: list[int] = []
        self.groups: list[tuple[int, int, tuple[int, ...]]] = []
        self.label_positions: list[int] = []
        self.labels: list[int] = []

    def add(self, samples: Sequence[Sample], medium: Tensor, counted: Sequence[bool]) -> None:
        """Append the group of samples that begin alike."""
        start = len(self.positions)
        tails = [(*sample.suffix_ids, *sample.answer_ids) for sample in samples]
        common = sum(
            1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*tails, strict=False))
        )
        media_end = len(samples[0].prefix_ids) + len(medium)
        self._text(samples[0].prefix_ids)
        self.pieces.append(medium)
        self._text(tails[0][:common])
        trunk = media_end + common
        self.positions += range(trunk)
        branches = []
        for sample, tail, counts in zip(samples, tails, counted, strict=True):
            branch = len(self.positions)
            if len(tail) > common:
                branches.append(len(tail) - common)
                self._text(tail[common:])
                self.positions += range(trunk, trunk + branches[-1])
            if counts:
                self._label(sample, start + media_end, common, branch)
        self.groups.append((start, trunk, tuple(branches)))

    def _text(self, ids: Sequence[int]) -> None:
        self.ids += ids
        self.pieces.append(len(ids))

    def _label(self, sample: Sample, tail_start: int, common: int, branch: int) -> None:
        """Append a sample's labels; each is predicted by the position in front of it."""
        if not sample.answer_ids:
            raise DataError(f"{sample.id} has no token to learn from; it has no answer")
        first = len(sample.suffix_ids) - 1
        for place in range(first, first + len(sample.answer_ids)):
            here = tail_start + place if place < common else branch + place - common
            self.label_positions.append(here)
        self.labels += sample.answer_ids
