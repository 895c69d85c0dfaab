"""Loading the shared language model and its tokenizer from an HF checkpoint folder."""

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from mera_ds.checkpoint import Manifest
from mera_ds.config import BackboneConfig
from mera_ds.deltas import weighted_deltas
from mera_ds.errors import DataError, InputError
from mera_ds.log import logger
from mera_ds.model.embedding import keep_embedding_on_host
from mera_ds.model.lora import fold_deltas
from mera_ds.model.recompute import set_recomputation

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


_SHOWN = 10
"""Tensors that a message names."""


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer from a local folder; never from a hub."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"backbone.path: no tokenizer can be loaded from {folder}: {error}"
        ) from None


def load_backbone(config: BackboneConfig, folder: Path) -> PreTrainedModel:
    """Load the frozen backbone in its compute dtype, with the attention that is available.

    Raises:
        InputError: if the folder is no causal language model that transformers knows.
        DataError: if its weights are damaged, or not exactly those that its `config.json` needs.
    """
    transformers.utils.logging.disable_progress_bar()
    attention, reason = choose_attention(config)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[config.dtype],
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, and refused below
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"backbone.path: no model can be loaded from {folder}: {error}") from None
    except SafetensorError as error:
        raise DataError(
            f"backbone.path: the weights in {folder} are damaged ({error}); restore them"
        ) from None
    llm, report = loaded
    _require_all_tensors(report, folder)
    _refuse_scaled_logits(llm, folder)
    prepare_backbone(llm, config)
    logger.info(
        *("backbone %s (%s) in %s, attention %s (%s)", folder.name, type(llm).__name__),
        *(config.dtype, attention, reason),
    )
    return llm


_FAULTS = {
    "missing_keys": "lacks tensors that its config.json needs",
    "mismatched_keys": "holds tensors of another shape than its config.json says",
    "unexpected_keys": "holds tensors that its config.json has no place for",
}
"""What transformers reports; the first two it would draw at random, the third leave away."""


def _require_all_tensors(report: Mapping[str, Iterable[Any]], folder: Path) -> None:
    for key, fault in _FAULTS.items():
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in report[key])
        if names:
            shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
            raise DataError(
                f"backbone.path: {folder} {fault} ({len(names)}): {shown}; fetch the folder again"
            )


def prepare_backbone(llm: PreTrainedModel, config: BackboneConfig) -> None:
    """Freeze a language model and set it up for training and for greedy decoding."""
    llm.requires_grad_(False)
    llm.config.use_cache = False
    # Its own sampling settings and penalties would change what greedy decoding says.
    llm.generation_config = GenerationConfig(eos_token_id=sorted(generation_ends(llm)) or None)
    set_recomputation(llm, config.gradient_checkpointing)
    if config.embedding_device == "cpu":
        keep_embedding_on_host(llm)


def generation_ends(llm: Any) -> set[int]:
    """Return the tokens that end a text according to the backbone's generation config."""
    ends = llm.generation_config.eos_token_id
    return set() if ends is None else set(ends) if isinstance(ends, list) else {int(ends)}


_SCALED = ("logit_scale", "logits_scaling", "final_logit_softcapping", "embedding_multiplier")
"""Settings of families (Cohere, Granite, Gemma) whose logits are not  head · hidden state."""


def _refuse_scaled_logits(llm: PreTrainedModel, folder: Path) -> None:
    for name in _SCALED:
        if getattr(llm.config, name, None) not in (None, 1, 1.0):
            raise InputError(
                f"backbone.path: {folder} is a {type(llm).__name__} with {name}="
                f"{getattr(llm.config, name)}, which the loss here does not apply; take a "
                "backbone of the Llama, Qwen or Mistral family"
            )


def choose_attention(config: BackboneConfig) -> tuple[str, str]:
    """Return which attention is used, and why.

    Raises:
        InputError: if the configuration asks for flash-attn where it can't run.
    """
    obstacle = _flash_obstacle(config)
    if config.attention == "flash_attention_2" and obstacle is not None:
        raise InputError(
            f"backbone.attention is flash_attention_2, but {obstacle}; set backbone.attention=auto "
            "to take what can run here (on a machine with CUDA, flash-attn is installed with "
            "'pip install flash-attn --no-build-isolation')"
        )
    if config.attention != "auto":
        return config.attention, "as configured"
    return ("flash_attention_2", "installed") if obstacle is None else ("sdpa", obstacle)


def _flash_obstacle(config: BackboneConfig) -> str | None:
    """Return why flash-attn can't be used; None if it can."""
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    if not torch.cuda.is_available():
        return "flash-attn needs a GPU and there is none"
    if config.dtype == "fp32":
        return "flash-attn computes in fp16 or bf16 only and backbone.dtype is fp32"
    return None


def fold_lineage(llm: PreTrainedModel, product: Path, manifest: Manifest) -> None:
    """Add the product's deltas to the base weights: θ = θ_base + Σ c_i Δ_i, in stage order."""
    fold_deltas(llm, weighted_deltas(product, manifest))
