"""`launch/merge.py` with two models on disk, as a command: its plan, its report, its refusals."""

import fcntl
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .commands import REPOSITORY, run, start, succeed

Refused = Callable[..., str]
COMMAND = "python launch/merge.py --previous A --tuned B --stage 3 --out C"
TENSORS = {"model.embed_tokens.weight": (6, 4), "model.norm.weight": (4,), "lm_head.weight": (6, 4)}
CONFIG = {"model_type": "llama", "vocab_size": 6, "tie_word_embeddings": False}


def write(folder: Path, seed: int, **replaced: Tensor) -> None:
    """Write a checkpoint small enough to be merged in no time."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(s, generator=generator).half() for n, s in TENSORS.items()}
    save_file({**tensors, **replaced}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"vocab": {}}')


def configure(folder: Path, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder with the checkpoints A and B."""
    write(tmp_path / "A", 1)
    write(tmp_path / "B", 2)
    return tmp_path


def merge(place: Path, *more: str) -> str:
    command = COMMAND.replace("launch/", f"{REPOSITORY}/launch/")
    return succeed(" ".join([command, *more]), place).output


class TestOutput:
    def test_it_says_what_was_merged(self, place: Path) -> None:
        lines = merge(place).splitlines()
        assert re.fullmatch(r"merged: C \([\d.]+ KB, [\d.]+ GB/s\)", lines[0])
        assert re.fullmatch(r"update [\d.]+, [\d.]+ % of the weights", lines[1])
        assert re.match(r"rounding [\d.]+ % of the weights, [\d.]+ % of the update", lines[2])
        assert lines[3] == "0 of 3 tensors unchanged"
        old, new, merged = (load_file(place / name / "model.safetensors") for name in "ABC")
        for name, tensor in merged.items():
            expected = torch.lerp(old[name].float(), new[name].float(), 1 / 3).half()
            torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-6)

    def test_a_dry_run_prints_the_plan_and_writes_nothing(self, place: Path) -> None:
        output = merge(place, "--dry-run", "--shard-size 60", "--dtype bf16")
        assert "stage 3: θ = 2/3 · θ_previous + 1/3 · θ_tuned\n" in output
        assert "tensors   3, 3 to be merged; written as BF16" in output
        assert output.count("model-0000") == 2
        assert re.search(r"^free      [\d.]+ GB$", output, re.MULTILINE)
        assert sorted(path.name for path in place.iterdir()) == ["A", "B"]

    def test_settings(self, place: Path) -> None:
        merge(place, "--shard-size 0.06KB", "--dtype float32", "--workers 3")
        files = sorted((place / "C").glob("*.safetensors"))
        assert len(files) == 3
        dtypes = {tensor.dtype for file in files for tensor in load_file(file).values()}
        assert dtypes == {torch.float32}

    def test_notes_are_printed(self, place: Path) -> None:
        configure(place / "B", eos_token_id=2)
        assert "note: config.json: eos_token_id is absent in A and 2 in B" in merge(place)


@pytest.mark.slow
def test_prompts_are_compared(tiny_template: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_template / "backbone", tmp_path / "A")
    shutil.copytree(tiny_template / "backbone", tmp_path / "B")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "A")
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "B")
    (tmp_path / "prompts.txt").write_text("a red square\n\nwhat is this?\n")
    output = merge(tmp_path, "--dtype bf16", "--prompts prompts.txt")
    assert re.search(r"logits of \d+ tokens beside the merge before rounding: largest", output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A", "B", "C", "prompts.txt"]


def without_head(place: Path) -> None:
    tensors = load_file(place / "B/model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, place / "B/model.safetensors")


def more_tokens(place: Path) -> None:
    write(place / "B", 2, **{"model.embed_tokens.weight": torch.zeros(7, 4).half()})


def other_dtype(place: Path) -> None:
    write(place / "B", 2, **{"model.norm.weight": torch.zeros(4)})


def other_tokenizer(place: Path) -> None:
    (place / "B/tokenizer.json").write_text('{"vocab": {"a": 1}}')


def other_configuration(place: Path) -> None:
    configure(place / "B", model_type="mistral", rope_theta=1.0)


def cut_file(place: Path) -> None:
    path = place / "A/model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def not_finite(place: Path) -> None:
    write(place / "B", 2, **{"model.norm.weight": torch.full((4,), torch.nan).half()})


def adapter(place: Path, **settings: object) -> None:
    shutil.rmtree(place / "B")
    (place / "B").mkdir()
    factors = {"A": torch.zeros(2, 9), "B": torch.zeros(6, 2)}
    save_file(
        {f"base_model.model.lm_head.lora_{name}.weight": t for name, t in factors.items()},
        place / "B/adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **settings}
    (place / "B/adapter_config.json").write_text(json.dumps(config))


def adapter_of_another_base(place: Path) -> None:
    adapter(place)


def adapter_with_dora(place: Path) -> None:
    adapter(place, use_dora=True)


def wrong_stage(place: Path) -> None:
    (place / "A/merge.json").write_text('{"stage": 3}')


def tuned_is_a_merge(place: Path) -> None:
    (place / "B/merge.json").write_text('{"stage": 2}')


def existing_output(place: Path) -> None:
    (place / "C").mkdir()
    (place / "C/something").write_text("mine")


WRONG = [
    (without_head, 2, "'lm_head.weight' is only in A\n  → 'lm_head.weight' is stored where"),
    (more_tokens, 2, "'model.embed_tokens.weight' is (6, 4) in A and (7, 4) in B\n  → the vocab"),
    (other_dtype, 2, "is F16 in A and F32 in B\n  → say what to write: --dtype fp16 or"),
    (other_tokenizer, 2, "tokenizer.json differs: the same text has other token ids"),
    (other_configuration, 2, "config.json: model_type is llama in A and mistral in B"),
    (cut_file, 3, "A/model.safetensors can't be read as safetensors (the tensors end at byte"),
    (not_finite, 3, "the merge of 'model.norm.weight' is not finite in F16; look at A/model"),
    (adapter_of_another_base, 2, "'lm_head.weight' is (6, 4) in A; B changes (6, 9)"),
    (adapter_with_dora, 2, "B/adapter_config.json: use_dora is True\n  → merge it with peft"),
    (wrong_stage, 2, "A is the merge of stage 3 (merge.json), so the next is stage 4, not 3"),
    (tuned_is_a_merge, 2, "B is the result of a merge (merge.json), not a model tuned after one"),
    (existing_output, 2, "C exists; delete it or choose another --out"),
]


@pytest.mark.parametrize(
    ("spoil", "status", "expected"), WRONG, ids=[spoil.__name__ for spoil, *_ in WRONG]
)
def test_wrong_input(
    spoil: Callable[[Path], None], status: int, expected: str, place: Path, refused: Refused
) -> None:
    spoil(place)
    message = refused(COMMAND, status, place)
    assert expected in message
    assert (place / "C").exists() == (spoil is existing_output)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("--shard-size many", "--shard-size many: give bytes, or e.g. 500MB or 5GB"),
        ("--workers 0", "--workers is 0; give at least 1"),
        ("--prompts nowhere.txt", "--prompts nowhere.txt can't be read"),
        ("--prompts A/empty", "--prompts A/empty holds no prompt; write one a line"),
    ],
)
def test_wrong_arguments(more: str, expected: str, place: Path, refused: Refused) -> None:
    (place / "A/empty").write_text("\n")
    assert refused(f"{COMMAND} {more}", 2, place).startswith(expected)


def test_a_busy_output(place: Path) -> None:
    (place / "C.partial").mkdir()
    descriptor = os.open(place / "C.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    ended = run(COMMAND.replace("launch/", f"{REPOSITORY}/launch/"), place)
    os.close(descriptor)
    assert ended.status == 6
    assert ended.message == "C.partial is in use by another merge into C; wait for it or stop it"


def test_too_little_space(place: Path) -> None:
    """A plan for more than any disk, from a checkpoint that is one hole."""
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}
    ).encode()
    for name in "AB":
        with (place / name / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + 4 * 10**12)
    ended = run(COMMAND.replace("launch/", f"{REPOSITORY}/launch/"), place)
    assert ended.status == 5, ended
    assert re.search(r"needs 40000\d\d\.\d MB and its disk has [\d.]+ MB free", ended.message)
    assert not list(place.glob("C*"))


def test_sigterm_keeps_the_finished_files(place: Path) -> None:
    large = {f"layer{n}": torch.full((1 << 20,), float(n)).half() for n in range(24)}
    write(place / "A", 1, **large)
    write(place / "B", 1, **{name: tensor + 1 for name, tensor in large.items()})
    command = f"{COMMAND} --shard-size 3MB --workers 1".replace("launch/", f"{REPOSITORY}/launch/")
    process = start(command, place)
    while process.poll() is None and len(list((place / "C.partial").glob("model-*"))) < 3:
        pass
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    if process.returncode:
        assert process.returncode == 143
        assert "stopped; run the same command to continue" in errors
        succeed(command, place)
    merged = {n: t for f in (place / "C").glob("*.safetensors") for n, t in load_file(f).items()}
    assert bool((merged["layer7"].float() - 7 - 1 / 3).abs().max() < 0.01)
