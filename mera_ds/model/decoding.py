"""Greedy decoding at the speed of the memory: a cache of fixed size and, on CUDA, CUDA graphs.

At batch 1 a token costs one pass over the backbone's weights. What comes on top is launches,
waiting for the host, and copies of keys and values; here there is none: one token is one call of
one function on tensors at fixed addresses, compiled into one CUDA graph, and the host looks only
every few tokens whether all texts have ended.

Shape letters: B rows, T positions of the prompt, M places of the cache, D backbone width, H heads.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mera_ds.config import Decode
from mera_ds.errors import InputError

ATTENTION = "mera_decode"
"""What transformers calls `attend`."""
STEPS_BETWEEN_LOOKS = 8
"""Tokens between two looks at whether all rows have ended; each look waits for the device."""
CACHE_STEP = 128
"""The cache's size is a multiple of this, so that few sizes are compiled."""

Step = Callable[..., Tensor]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """SDPA for a prompt; for one new token, attention that never repeats grouped keys and values.

    `repeat_kv` would write and read keys and values four times over in a Llama-3-8B. The queries
    (B, H, 1, D) that share a key head are the rows of one matrix here.
    """
    if query.shape[2] > 1 or attention_mask is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    rows, heads, _, width = query.shape
    packed = query.reshape(rows, key.shape[1], -1, width)
    scores = packed @ key.transpose(2, 3) * (scaling or width**-0.5)
    scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).reshape(rows, 1, heads, -1), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def next_token(
    llm: Any, cache: StaticCache, tokens_B1: Tensor, positions_B1: Tensor, mask_BM: Tensor | None
) -> Tensor:
    """Return the greedy successors (B, 1) of some tokens, whose keys and values join the cache."""
    logits_B1V = llm(
        input_ids=tokens_B1,
        position_ids=positions_B1,
        attention_mask=mask_BM,
        past_key_values=cache,
        use_cache=True,
    ).logits
    return logits_B1V[:, -1].argmax(dim=-1, keepdim=True)


class StaticDecoder:
    """Continues rows greedily with a cache that stays where it is from call to call.

    The backbone attends through `attend` from then on.
    """

    def __init__(self, llm: Any, step: Step = next_token) -> None:
        """Prepare; `step` is `next_token` or a compiled version of it."""
        llm.set_attn_implementation(ATTENTION)
        self._llm = llm
        self._step = step
        self._cache: StaticCache | None = None
        self._rows = self._places = 0

    @torch.no_grad()
    def __call__(
        self, embeddings: Tensor, attention: Tensor, max_new_tokens: int, ends: Collection[int]
    ) -> Tensor:
        """Return token ids (B, at most `max_new_tokens`); behind a row's first end they are noise.

        Args:
            embeddings: (B, T, D), padded on the left.
            attention: (B, T) 1 on real positions, 0 on padding.
            max_new_tokens: most tokens per row.
            ends: tokens that end a row.
        """
        wanted, length = attention.shape
        cache = self._room(wanted, length + max_new_tokens)
        # A smaller batch is filled up with its last row, so that the compiled graph fits.
        rows = torch.arange(self._rows, device=attention.device).clamp(max=wanted - 1)
        attention = attention[rows]
        ended = torch.tensor(sorted(ends), device=attention.device)
        tokens = self._prefill(cache, embeddings[rows], attention)
        positions = attention.sum(dim=1, keepdim=True)
        mask = self._mask(attention)
        said = [tokens]
        while len(said) < max_new_tokens:
            if len(said) % STEPS_BETWEEN_LOOKS == 0:
                finished = torch.isin(torch.cat(said, dim=1), ended).any(dim=1)
                if bool(finished.all()):
                    break
            torch.compiler.cudagraph_mark_step_begin()
            # What a CUDA graph returns is overwritten by its next run.
            tokens = self._step(self._llm, cache, tokens, positions, mask).clone()
            positions = positions + 1
            said.append(tokens)
        return torch.cat(said, dim=1)[:wanted]

    def _room(self, rows: int, places: int) -> StaticCache:
        """Return an empty cache for at least so many rows and places; it never shrinks."""
        if self._cache is None or rows > self._rows or places > self._places:
            self._rows = max(rows, self._rows)
            self._places = max(-(-places // CACHE_STEP) * CACHE_STEP, self._places)
            self._cache = None  # the memory of the old one is free for the new one
            self._cache = StaticCache(config=self._llm.config, max_cache_len=self._places)
        self._cache.reset()
        return self._cache

    def _prefill(self, cache: StaticCache, embeddings: Tensor, attention: Tensor) -> Tensor:
        """Return the first token (B, 1) behind each prompt; only its logits are computed."""
        padded = not bool(attention.all())
        positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
        logits = self._llm(
            inputs_embeds=embeddings,
            position_ids=positions,
            attention_mask=attention if padded else None,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1].argmax(dim=-1, keepdim=True)

    def _mask(self, attention: Tensor) -> Tensor | None:
        """Return which places of the cache (B, M) are never padding; one row has none."""
        if len(attention) == 1:
            return None
        more = self._places - attention.shape[1]
        return nn.functional.pad(attention, (0, more), value=1)


def make_decoder(llm: Any, decode: Decode, rows: int) -> StaticDecoder:
    """Return the decoder for `execution.decode`.

    Args:
        llm: a causal language model of transformers, on its device.
        decode: `static` or `compiled`.
        rows: the size of a batch.

    Raises:
        InputError: if it is to be compiled where there is no CUDA.
    """
    if decode == "static":
        return StaticDecoder(llm)
    if not torch.cuda.is_available():
        raise InputError(
            "execution.decode=compiled needs a GPU, and there is none; use eager or static"
        )
    options: dict[str, Any] = {
        "triton.cudagraphs": True,
        # At one row every product is a matrix times a vector; tuned kernels read it faster.
        "coordinate_descent_tuning": rows == 1,
    }
    return StaticDecoder(llm, torch.compile(next_token, fullgraph=True, options=options))
