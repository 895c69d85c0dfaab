"""A lineage as one PEFT adapter, for servers that load base + adapter.

    Σ_j w_j · B_j A_j = [w_1 B_1 | w_2 B_2 | …] · [A_1; A_2; …]

so the factors side by side are one adapter whose rank is the sum of the stages', with the
coefficients folded into B; alpha = rank makes PEFT's own scaling 1. It can be compressed to a lower
rank by a singular value decomposition in factor space, which is the nearest there is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mera_ds.checkpoint import save_tensors
from mera_ds.errors import InputError
from mera_ds.files import committed_folder, require_space, write_json
from mera_ds.manifest import Manifest
from mera_ds.merge.compare import EXPORT_RECORD
from mera_ds.merge.export import DTYPES, copy_product, lineage_update, record
from mera_ds.merge.factors import LowRank, compress, norm, total
from mera_ds.merge.partial import require_new

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Compression:
    """What an adapter of a given rank misses of the lineage's update."""

    rank: int
    """Largest rank of a layer."""
    relative: float
    """Norm of what is missing over the norm of the update, over all layers."""


def export_adapter(
    base: Path,
    product: Path,
    manifest: Manifest,
    output: Path,
    *,
    rank: int | None = None,
    dtype: str = "fp32",
) -> Compression:
    """Write the whole lineage as one PEFT LoRA adapter, connectors and manifest beside it.

    Args:
        base: HF folder of the bare backbone, named in the adapter.
        product: the model.
        manifest: its manifest.
        output: the folder to write; must not exist.
        rank: compress every layer to at most this rank; None: exact.
        dtype: of the factors: `fp32`, `fp16` or `bf16`.

    Raises:
        InputError: if the output exists or can't be made, or the lineage changes nothing.
        DataError: if a factor is not finite in the dtype.
        ResourceError: if the disk is too small.
    """
    require_new(output)
    layers, update = lineage_update(product, manifest)
    if not layers:
        raise InputError(f"{product} has no delta that counts; there is no adapter to write")
    tensors, ranks = {}, {}
    lost = whole = 0.0
    for layer in layers:
        terms = update(layer)
        assert not isinstance(terms, torch.Tensor)
        joined = total([LowRank(left.double() * w, right.double()) for w, left, right in terms])
        whole += norm(joined) ** 2
        written, missed = _written(joined, rank, DTYPES[dtype])
        lost += missed**2
        ranks[layer] = written.rank
        tensors[f"base_model.model.{layer}.lora_A.weight"] = written.right
        tensors[f"base_model.model.{layer}.lora_B.weight"] = written.left
    require_space(output.parent, sum(t.nbytes for t in tensors.values()) + 50_000_000)
    found = Compression(max(ranks.values()), (lost / whole) ** 0.5 if whole > 0 else 0.0)
    with committed_folder(output) as folder:
        save_tensors(folder / WEIGHTS, tensors)
        write_json(folder / CONFIG, _config(base, ranks))
        copy_product(product, manifest, folder)
        facts = {"rank": found.rank, "relative_error": found.relative}
        write_json(folder / EXPORT_RECORD, record(manifest, None) | facts)
    return found


def _written(update: LowRank, rank: int | None, dtype: torch.dtype) -> tuple[LowRank, float]:
    """Return the factors as they are written, and the norm of what they miss of the update."""
    found, missed = update, 0.0
    if rank is not None and rank < update.rank:
        found, missed = compress(update, rank)
    found = LowRank(found.left.to(dtype), found.right.to(dtype))
    if dtype != torch.float32:
        missed = norm(total([update, found.double() * -1.0]))
    return found, missed


def _config(base: Path, ranks: Mapping[str, int]) -> dict[str, Any]:
    rank = max(ranks.values())
    others = {layer: own for layer, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.resolve()),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": _targets(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }


def _targets(ranks: Mapping[str, int]) -> list[str]:
    """Return the last parts of the layers' names, which is what servers look for.

    A layer of such a name without a delta would only get a zero adapter.
    """
    return sorted({layer.rpartition(".")[2] for layer in ranks})
