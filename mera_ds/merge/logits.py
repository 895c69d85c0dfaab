"""What rounding does to a merged model's predictions: its logits beside those of the exact merge.

The exact merge is written in fp32 next to the output, loaded, and removed again; both models
compute in fp32, so that nothing but the rounding of the weights differs.
"""

import gc
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mera_ds.errors import InputError
from mera_ds.files import TEMPORARY
from mera_ds.merge.compare import OTHER_IDS
from mera_ds.merge.plan import MergePlan
from mera_ds.merge.state_dicts import carry_out, prepare_merge

PROMPTS = (
    "The capital of France is",
    "Question: What colour is the sky on a clear day?\nAnswer:",
    "def add(a, b):\n    return",
    "Once upon a time there was a",
)
_IDS_PER_PROMPT = 32


def require_tokenizer(plan: MergePlan) -> None:
    """Raise an `InputError` if the output will have no tokenizer to read prompts with."""
    folders = [plan.previous] if plan.adapter else [plan.previous, plan.tuned]
    if not any((folder / name).exists() for folder in folders for name in OTHER_IDS):
        raise InputError(
            f"--prompts needs a tokenizer and {plan.previous} has none; add its files, or use "
            "--check-logits alone, which then takes token ids by chance"
        )


def compare_logits(plan: MergePlan, output: Path, prompts: Sequence[str]) -> list[str]:
    """Return a printed comparison of a merged model with its merge before rounding.

    Args:
        plan: the merge.
        output: the folder it wrote.
        prompts: texts; the built-in ones if there are none.

    Raises:
        InputError: if transformers can't load the output.
        ResourceError: if the disk has no room for the exact merge.
    """
    rows = _token_ids(output, prompts or PROMPTS)
    written = _logits(output, rows)
    exact_folder = output.with_name(f"{output.name}{TEMPORARY}-exact")
    try:
        exact_plan = prepare_merge(
            plan.previous,
            plan.tuned,
            plan.stage,
            exact_folder,
            dtype="F32",
            method=plan.rule.name,
            options=plan.rule.options,
            base=plan.rule.base,
        )
        carry_out(exact_plan, exact_folder)
        exact = _logits(exact_folder, rows)
    finally:
        for folder in (exact_folder, Path(f"{exact_folder}{TEMPORARY}")):
            shutil.rmtree(folder, ignore_errors=True)
    return _described(exact, written)


def _token_ids(folder: Path, prompts: Sequence[str]) -> list[Tensor]:
    """Return one row of ids (1, tokens) per prompt; by chance if there is no tokenizer."""
    if any((folder / name).exists() for name in OTHER_IDS):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        rows = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts]
        return [row for row in rows if row.numel()]
    generator = torch.Generator().manual_seed(0)
    size = _load(folder).get_input_embeddings().num_embeddings
    return [torch.randint(size, (1, _IDS_PER_PROMPT), generator=generator) for _ in prompts]


def _load(folder: Path) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        ).eval()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} can't be loaded for the logit check: {error}") from None


@torch.no_grad()
def _logits(folder: Path, rows: Sequence[Tensor]) -> Tensor:
    """Return the logits of all tokens of all prompts: (tokens, vocabulary)."""
    model = _load(folder)
    found = torch.cat([model(row).logits[0] for row in rows])
    del model
    gc.collect()
    return found


def _described(exact: Tensor, written: Tensor) -> list[str]:
    log_p, log_q = exact.log_softmax(-1), written.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)
    same = (exact.argmax(-1) == written.argmax(-1)).float().mean()
    return [
        f"logits of {len(exact)} tokens beside the merge before rounding: "
        f"largest difference {float((exact - written).abs().max()):.3g}, "
        f"KL mean {float(divergence.mean()):.2g} and at most {float(divergence.max()):.2g}, "
        f"{100 * float(same):.4g} % same next token"
    ]
