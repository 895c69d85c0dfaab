"""One stage on a folder in Llama 3's format: doctor, align without a frame, tune, evaluate."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_backbones import write_backbone
from cli.commands import succeed

SUFFIX = "Answer the question using a single word or phrase."
SETTINGS = (
    "order=[image]",
    "backbone.path={weights}/llama",
    "prompt.align_style=bare",
    f"prompt.qa_suffix={SUFFIX}",
    "prompt.system=You see and hear.",
    "align.max_steps=3",
    "tune.max_steps=3",
    "evaluate.limit=4",
    "backbone.gradient_checkpointing=true",
)


@pytest.mark.slow
def test_a_stage_on_a_backbone_in_the_format_of_llama_3(
    make_tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    write_backbone(tmp_path / "weights/llama", "llama")
    run = make_tiny_run(*SETTINGS)
    variables = {"MERA_WEIGHTS": str(tmp_path / "weights")}
    checked = succeed(f"mera-ds doctor {run}", tmp_path, **variables).output
    assert "LlamaForCausalLM, 2 layers of width 32" in checked
    ended = succeed(f"mera-ds run {run}", tmp_path, **variables)
    assert "attention sdpa (flash-attn " in ended.errors
    lines = (run / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["task"] for line in lines} == {"caption", "qa"}
    said = [
        json.loads(line)["prediction"]
        for path in run.glob("stages/01-image/evaluation/predictions/*/*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert len(said) == 8
    assert not any("<|" in text for text in said)
