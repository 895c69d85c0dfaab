"""The logit check finds what rounding does, and leaves nothing behind."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mera_ds.errors import InputError
from mera_ds.merge.logits import PROMPTS, compare_logits, require_tokenizer
from mera_ds.merge.state_dicts import carry_out, prepare_merge

from .models import base_model, checkpoint, moved, state


def figures(lines: list[str]) -> list[float]:
    (line,) = lines
    return [float(number) for number in re.findall(r"[\d.]+(?:e-?\d+)?", line)]


@pytest.mark.parametrize(("dtype", "largest"), [("F32", 0.0), ("BF16", 1.0)])
def test_the_difference_is_that_of_the_rounded_weights(
    tmp_path: Path, dtype: str, largest: float
) -> None:
    previous = checkpoint(tmp_path / "previous", base_model(), "8KB")
    tuned = checkpoint(tmp_path / "tuned", moved(base_model(), 1))
    output = tmp_path / "out"
    plan = prepare_merge(previous, tuned, 2, output, dtype=dtype)
    carry_out(plan, output)
    tokens, difference, _, divergence, _ = figures(compare_logits(plan, output, []))
    assert tokens == 32 * len(PROMPTS)
    rows = [torch.randint(48, (1, 32), generator=torch.Generator().manual_seed(0))]
    exact = base_model()
    exact.load_state_dict(
        {name: (state(previous)[name] + state(tuned)[name]) / 2 for name in state(previous)}
    )
    written = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        first = float((exact(rows[0]).logits - written(rows[0]).logits).abs().max())
    assert first - 1e-6 <= difference <= largest
    assert (divergence > 0) == (dtype == "BF16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "previous", "tuned"]


def test_prompts_need_a_tokenizer(tmp_path: Path) -> None:
    previous = checkpoint(tmp_path / "previous", base_model())
    tuned = checkpoint(tmp_path / "tuned", base_model())
    plan = prepare_merge(previous, tuned, 2, tmp_path / "out")
    with pytest.raises(InputError, match=r"--prompts needs a tokenizer and .*previous has none"):
        require_tokenizer(plan)
    (previous / "tokenizer.json").write_text("{}")
    require_tokenizer(plan)
