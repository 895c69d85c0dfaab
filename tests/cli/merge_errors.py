"""What `launch/merge.py` prints for wrong inputs: the page docs/merge-errors.md.

python -m tests.cli.merge_errors          writes the page anew
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from mera_ds.cli.launch import merge

PAGE = Path(__file__).parents[2] / "docs" / "merge-errors.md"
COMMAND = ("--previous", "A", "--tuned", "B", "--stage", "3", "--out", "C")
SHAPES = {
    "model.embed_tokens.weight": (6, 4),
    "model.layers.0.mlp.up_proj.weight": (4, 4),
    "lm_head.weight": (6, 4),
}
CONFIG = {"model_type": "llama", "vocab_size": 6, "tie_word_embeddings": False}
HEAD = """# What a merge says to wrong inputs

Printed by `python launch/merge.py --previous A --tuned B --stage 3 --out C` (arguments that differ
are named), all before a byte is written but for the last one, which leaves nothing behind. This
page is compared with the program by `tests/cli/test_merge_errors.py`.
"""


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).half() for name, shape in SHAPES.items()}


def write(folder: str, tensors: Mapping[str, Tensor], **config: Any) -> None:
    Path(folder).mkdir(exist_ok=True)
    save_file(dict(tensors), f"{folder}/model.safetensors", metadata={"format": "pt"})
    Path(folder, "config.json").write_text(json.dumps({**CONFIG, **config}))
    Path(folder, "tokenizer.json").write_text('{"vocab": {}}')


def write_adapter(**settings: Any) -> None:
    Path("L").mkdir()
    prefix = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {f"{prefix}.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    save_file(factors, "L/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, **settings}
    Path("L/adapter_config.json").write_text(json.dumps(config))


def cut_file() -> None:
    path = Path("B/model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


def merged_before() -> None:
    Path("A/merge.json").write_text('{"stage": 1}')


def replaced(**changes: Tensor) -> None:
    """Write B with some tensors changed; `embed` and `up` stand for the names."""
    names = {"embed": "model.embed_tokens.weight", "up": "model.layers.0.mlp.up_proj.weight"}
    write("B", {**weights(2), **{names[key]: value for key, value in changes.items()}})


@dataclass(frozen=True)
class Case:
    """One wrong input."""

    title: str
    break_it: Callable[[], object]
    arguments: tuple[str, ...] = ()
    """Instead of those of the command, or in addition."""


CASES = (
    Case("The output exists", lambda: Path("C").mkdir()),
    Case("Stages count from 1", lambda: None, ("--stage", "0")),
    Case("Not a checkpoint", lambda: Path("A/config.json").unlink()),
    Case("A file was cut", cut_file),
    Case("A tensor is missing", lambda: write("B", dict(list(weights(2).items())[:2]))),
    Case("Tokens were added", lambda: replaced(embed=torch.ones(8, 4).half())),
    Case("Two dtypes", lambda: replaced(up=torch.ones(4, 4))),
    Case("Another configuration", lambda: write("B", weights(2), rope_theta=5e5, vocab_size=7)),
    Case("Another tokenizer", lambda: Path("B/tokenizer.json").write_text('{"vocab": {"a": 1}}')),
    Case("A stage was left out", merged_before),
    Case("DoRA", lambda: write_adapter(use_dora=True), ("--tuned", "L")),
    Case("A method without its base", lambda: None, ("--method", "ties")),
    Case("A method for low-rank deltas", lambda: None, ("--method", "opcm")),
    Case("An unknown option", lambda: None, ("--method", "ema", "decya=0.9")),
    Case("Not a number", lambda: replaced(up=torch.full((4, 4), float("nan")).half())),
)


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *(_section(case) for case in CASES)])


def _section(case: Case) -> str:
    status, printed = outcome(case)
    given = f" (`{' '.join(case.arguments)}`)" if case.arguments else ""
    return f"## {case.title}{given}\n\n```\n{printed.strip()}\n```\n\nExit status {status}.\n"


def outcome(case: Case) -> tuple[int, str]:
    """Return the exit status and what is printed; nothing may be left behind."""
    with _folder_of_two(), mock.patch.dict(os.environ):
        case.break_it()
        before = sorted(Path().rglob("*"))
        words = dict(zip(COMMAND[::2], COMMAND[1::2], strict=True))
        pairs = case.arguments[: 2 * (len(case.arguments) // 2)]
        words |= dict(zip(pairs[::2], pairs[1::2], strict=True))
        rest = case.arguments[len(pairs) :]
        argv = ["merge.py", *(word for pair in words.items() for word in pair), *rest]
        output = io.StringIO()
        with mock.patch.object(sys, "argv", argv), contextlib.redirect_stderr(output):
            status = merge()
        assert sorted(Path().rglob("*")) == before, case.title
    return status, output.getvalue()


@contextlib.contextmanager
def _folder_of_two() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write("A", weights(1))
        write("B", weights(2))
        yield


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
