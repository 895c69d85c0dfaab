"""A model of the memory that training takes, checked by `benchmarks/memory.py`.

What autograd keeps of a block is counted tensor by tensor (letters: D width, Q and K widths of all
query and key heads, I width of the MLP, r rank); transients and the process itself are measured
constants. Sizes are in bytes. Of full fine-tuning on several ranks nothing was measured yet.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mera_ds.config import Recomputation
from mera_ds.estimate.shape import Shape

SIZE = {"fp32": 4, "fp16": 2, "bf16": 2}
Device = Literal["cpu", "cuda"]

PROCESS = 0.51e9
"""Resident memory of Python, torch, transformers and DeepSpeed on a CPU."""
OPTIMIZER_CPU = {0: 8.0, 1: 20.4, 2: 20.4, 3: 31.0}
"""ZeRO stage -> bytes per trainable parameter beside it, as DeepSpeed 0.19 has them on a CPU."""
STEP_COPY = 4
"""Bytes per trainable parameter of the fp32 gradients that a step makes of fp16 ones."""
WORKSPACE_CUDA = 0.3e9
"""Workspaces of cuBLAS, buckets of DeepSpeed."""
ZERO_3_BUFFERS = 1.5e9
"""Numbers that each of several ranks has at once under ZeRO 3: parameters that are whole
(`ds_configs/zero3.json`) and the bucket of gradients."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What decides the memory of a training step on one rank."""

    shape: Shape
    dtype: str
    lora_rank: int
    """0: the backbone has no LoRA (align, realign, full fine-tuning)."""
    full: bool = False
    """Whether all weights of the backbone train."""
    dropout: float
    recompute: Recomputation
    """`backbone.gradient_checkpointing`."""
    rows: int
    """Samples of a micro-batch."""
    length: int
    """Tokens of its rows, padding included."""
    labels: int
    """Supervised tokens of the micro-batch."""
    connectors: int
    """Parameters of the connectors that train."""
    encoders: float
    """Bytes of the encoders' weights on the device."""
    zero: int = 1
    ranks: int = 1
    moment_bytes: float = 8.0
    """Adam's state per parameter; 2 with 8-bit moments."""
    penalty_bytes: float = 0.0
    """What EWC keeps beside it, per parameter of LoRA (see `mera_ds.train.penalty`)."""
    embedding_on_device: bool = True

    @property
    def added(self) -> int:
        """Parameters that train beside the backbone's own."""
        return self.connectors + self.shape.lora(self.lora_rank)

    @property
    def trainable(self) -> int:
        """Parameters that train."""
        return self.added + (self.shape.parameters if self.full else 0)


def kept_per_token(training: Training, device: Device) -> float:
    """Return the bytes that autograd keeps of one block per token, without recomputation.

    Frozen layers keep nothing of their inputs. Kept are: the inputs of both norms in fp32; q, k, v
    and the attention's output; the gate, its SiLU and the up projection. LoRA adds the inputs of
    its layers (with dropout each has its own, and a mask) and its inner products. Where all weights
    train, each layer and the scale of each norm keep their inputs.
    """
    shape, size = training.shape, SIZE[training.dtype]
    query, key = shape.heads * shape.head_width, shape.key_heads * shape.head_width
    norms = 2 * shape.width * 4
    attention = (2 * query + 2 * key) * size
    mlp = 3 * shape.inner * size
    if training.full:
        return norms + attention + mlp + (4 * shape.width + shape.inner) * size
    if not training.lora_rank:
        return norms + attention + mlp
    inner = 7 * training.lora_rank * size
    if not training.dropout:
        return norms + attention + mlp + (2 * shape.width + shape.inner) * size + inner
    mask = 1 if device == "cuda" else size  # a kernel of its own keeps one byte
    inputs = 5 * shape.width + query + shape.inner
    return norms + attention + mlp + inputs * (size + mask) + inner


def training_memory(training: Training, device: Device) -> dict[str, float]:
    """Return the parts of the peak of a training step on one rank, in bytes.

    They are resident memory on a CPU (where freed memory is given back at once), allocated memory
    on a GPU.
    """
    shape, size = training.shape, SIZE[training.dtype]
    tokens = training.rows * training.length
    share = training.ranks if training.zero == 3 else 1
    buffers = min(ZERO_3_BUFFERS, shape.parameters) if share > 1 else 0
    stepped = training.trainable / (training.ranks if training.zero else 1)
    held = shape.parameters - (0 if training.embedding_on_device else shape.embedding)
    kept = kept_per_token(training, device)
    again = _recomputed(training.recompute, shape.layers)
    light = again * (
        _kept_selectively(training) if training.recompute == "selective" else shape.width * size
    )
    light += (shape.layers - again) * kept
    transient = (3 * shape.inner + 2 * shape.width) * size
    # The loss is computed before any block is computed again.
    logits = training.labels * shape.vocabulary * (16 + (size if size < 4 else 0))
    return {
        "process": PROCESS if device == "cpu" else WORKSPACE_CUDA,
        "backbone": held * size / share,
        "encoders": training.encoders,
        "buffers": buffers * size,
        "trainables": training.added * size / share,
        "optimizer": _optimizer(training, device),
        "gradients": training.trainable * size / (training.ranks if training.zero >= 2 else 1),
        "activations": max(
            tokens * (light + (kept if again else 0) + transient),
            tokens * light + logits,
            STEP_COPY * stepped if device == "cuda" else 0,
        ),
    }


def _recomputed(recompute: Recomputation, layers: int) -> int:
    """Return how many blocks are computed again."""
    if isinstance(recompute, str):
        return 0 if recompute == "none" else layers
    return layers * recompute if isinstance(recompute, bool) else min(recompute, layers)


def _kept_selectively(training: Training) -> float:
    """Return the bytes per token that a block keeps: what its products and its attention gave."""
    shape, size = training.shape, SIZE[training.dtype]
    query = shape.heads * shape.head_width
    products = sum(outputs for _, outputs in shape.linears)
    lora = products + 7 * training.lora_rank if training.lora_rank else 0
    return (shape.width + query + products + lora) * size


def _optimizer(training: Training, device: Device) -> float:
    if device == "cpu":
        per_parameter = OPTIMIZER_CPU[training.zero]
    else:
        per_parameter = 4 + training.moment_bytes
    kept = training.penalty_bytes * training.shape.lora(training.lora_rank)
    return (per_parameter * training.trainable + kept) / (training.ranks if training.zero else 1)


def inference_memory(
    device: Device,
    shape: Shape,
    dtype: str,
    rows: int,
    length: int,
    encoders: float,
    connectors: int,
) -> float:
    """Return the bytes that evaluation holds: weights and the key-value cache.

    Args:
        device: where it runs.
        shape: the backbone's.
        dtype: the backbone's.
        rows: samples of a batch.
        length: longest row with its answer, in tokens.
        encoders: bytes of the encoders.
        connectors: parameters of the connectors, which are fp32.
    """
    size = SIZE[dtype]
    cache = 2 * shape.layers * shape.key_heads * shape.head_width * size * rows * length
    process = PROCESS if device == "cpu" else 0.0
    return process + shape.parameters * size + connectors * 4 + encoders + cache


def total(parts: Mapping[str, float]) -> float:
    """Return the sum of the parts, in bytes."""
    return sum(parts.values())
