"""Adam with moments of 8 bit (bitsandbytes), and its moments as full tensors and back.

bitsandbytes keeps a moment as a code of 8 bit per number and one scale per block of numbers: a
number is  map[code] · scale. Blocks are cut from what this rank's optimizer updates, so codes fit
no other number of ranks; checkpoints hold the numbers. Where the blocks are the same again, so are
codes and scales, to the bit; otherwise each number is rounded once more, as at any step.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mera_ds.errors import InputError

MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2}
"""Torch's names of Adam's moments, and their numbers in bitsandbytes' names."""
_BLOCK_SIZES = tuple(2**power for power in range(6, 13))
_CHUNK = 2**20
"""Numbers that are worked on at once; a multiple of every block size."""


def adamw_8bit(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """Return bitsandbytes' AdamW with moments of 8 bit.

    Raises:
        InputError: if bitsandbytes is not installed or can't be loaded.
    """
    try:
        bitsandbytes: Any = importlib.import_module("bitsandbytes")  # it states no types
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(
            f"optimizer=adamw8bit needs bitsandbytes, which can't be loaded ({error}); install it "
            "with 'pip install bitsandbytes', or use optimizer=adamw"
        ) from None
    return cast(torch.optim.Optimizer, bitsandbytes.optim.AdamW8bit(groups, **settings))


def create_moments(optimizer: Any, tensors: Sequence[Tensor]) -> None:
    """Give the tensors that an optimizer updates their moments, before the first step."""
    groups = optimizer.param_groups
    whole = {**groups[0], "params": list(tensors)}
    optimizer.param_groups = [whole]  # under ZeRO 3 a group has its tensors only during a step
    for position, tensor in enumerate(tensors):
        optimizer.init_state(whole, tensor, 0, position)
    optimizer.param_groups = groups


def unpack(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the moments (N,) of one tensor under torch's names: new fp32 tensors on the CPU."""
    found = {}
    for name, number in MOMENTS.items():
        codes = state[f"state{number}"]
        if codes.dtype != torch.uint8:  # bitsandbytes leaves small tensors in fp32
            found[name] = codes.detach().to("cpu", torch.float32, copy=True)
            continue
        scales, table = state[f"absmax{number}"].cpu(), state[f"qmap{number}"].cpu()
        size = _block_size(codes.numel(), scales.numel())
        numbers = torch.empty(codes.shape)
        for start in range(0, codes.numel(), _CHUNK):
            chunk = codes.flatten()[start : start + _CHUNK].cpu()
            repeated = scales[start // size :].repeat_interleave(size)[: len(chunk)]
            numbers.view(-1)[start : start + _CHUNK] = table[chunk.int()] * repeated
        found[name] = numbers
    return found


def pack(state: Mapping[str, Any], moments: Mapping[str, Tensor]) -> None:
    """Set the moments of one tensor from what `unpack` returns."""
    for name, number in MOMENTS.items():
        codes = state[f"state{number}"]
        if codes.dtype != torch.uint8:
            codes.copy_(moments[name])
            continue
        scales, table = state[f"absmax{number}"], state[f"qmap{number}"].cpu()
        size = _block_size(codes.numel(), scales.numel())
        numbers = moments[name].flatten()
        for start in range(0, numbers.numel(), _CHUNK):
            chunk = numbers[start : start + _CHUNK]
            found_codes, found_scales = _encode(chunk, table, size)
            codes.view(-1)[start : start + len(chunk)] = found_codes.to(codes.device)
            first = start // size
            scales[first : first + len(found_scales)] = found_scales.to(scales.device)


def _encode(numbers: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return codes (N,) and scales, of all possible ones those that give the numbers exactly.

    The scale is a block's largest magnitude. If that was a negative number, the map, which ends at
    +1 but at -0.993, has made it smaller, and the scale is found by dividing.
    """
    padding = -len(numbers) % size
    blocks = torch.nn.functional.pad(numbers, (0, padding)).view(-1, size)
    largest = blocks.abs().amax(dim=1)
    possible = [largest]
    if table[0] < 0:
        divided = largest / table[0].abs()
        limits = torch.tensor([math.inf, 0.0])
        possible += [divided, *(torch.nextafter(divided, limit) for limit in limits)]
    codes, exact = _nearest(blocks, largest, table)
    scales = largest.clone()
    for scale in possible[1:]:
        others, others_exact = _nearest(blocks, scale, table)
        better = others_exact & ~exact
        codes[better], scales[better], exact = others[better], scale[better], exact | better
    return codes.view(-1)[: len(numbers)], scales


def _nearest(blocks: Tensor, scales: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest code of each number, and which blocks they give exactly."""
    divisors = torch.where(scales > 0, scales, 1.0)[:, None]
    middles = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(blocks / divisors, middles)
    exact = (table[codes] * scales[:, None] == blocks).all(dim=1)
    return codes.to(torch.uint8), exact


def _block_size(numbers: int, scales: int) -> int:
    return next(size for size in _BLOCK_SIZES if math.ceil(numbers / size) == scales)
