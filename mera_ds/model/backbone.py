"""Loading the shared language model and its tokenizer from an HF checkpoint folder."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mera_ds.checkpoint import Manifest
from mera_ds.config import BackboneConfig
from mera_ds.deltas import weighted_deltas
from mera_ds.errors import InputError
from mera_ds.log import logger
from mera_ds.model.lora import fold_deltas

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer from a local folder; never from a hub."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"backbone.path: no tokenizer can be loaded from {folder}: {error}"
        ) from None


def load_backbone(config: BackboneConfig, folder: Path) -> PreTrainedModel:
    """Load the frozen backbone in its compute dtype, with the attention that is available.

    Raises:
        InputError: if the folder is no causal language model that transformers knows.
    """
    transformers.utils.logging.disable_progress_bar()
    attention = _attention(config)
    try:
        llm = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[config.dtype],
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"backbone.path: no model can be loaded from {folder}: {error}") from None
    llm.requires_grad_(False)
    llm.config.use_cache = False
    if config.gradient_checkpointing:
        llm.gradient_checkpointing_enable({"use_reentrant": False})
    logger.info("backbone %s in %s, attention %s", folder.name, config.dtype, attention)
    return llm


def _attention(config: BackboneConfig) -> str:
    if config.attention != "auto":
        return config.attention
    flash = (
        importlib.util.find_spec("flash_attn") is not None
        and torch.cuda.is_available()
        and config.dtype != "fp32"
    )
    return "flash_attention_2" if flash else "sdpa"


def fold_lineage(llm: PreTrainedModel, product: Path, manifest: Manifest) -> None:
    """Add the product's deltas to the base weights: θ = θ_base + Σ c_i Δ_i, in stage order."""
    fold_deltas(llm, weighted_deltas(product, manifest))
