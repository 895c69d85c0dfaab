"""How much there is to do: texts, tokens, operations."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mera_ds.config import PromptConfig, RunConfig
from mera_ds.errors import InputError
from mera_ds.estimate.shape import Shape
from mera_ds.identity import data_folders
from mera_ds.shards.format import TASKS, read_index

CHARS_PER_TOKEN = 4
"""Of English text."""
FRAME_TOKENS = {"chat": 24, "plain": 2}
"""What a prompt adds to its texts."""
TABLE_6 = {
    "coco": ("caption", 82_000, 52),
    "okvqa": ("qa", 26_000, 46),
    "msvd": ("caption", 48_000, 37),
    "msvdqa": ("qa", 30_000, 34),
    "audiocaps": ("caption", 44_000, 48),
    "clothoaqa": ("qa", 15_000, 50),
    "cap3d": ("caption", 50_000, 70),
    "cap3dqa": ("qa", 30_000, 60),
}
"""Dataset -> task, training texts by the paper's table 6, and assumed characters of a text."""
TEST_ITEMS = 1000
"""Of a dataset that is not there."""


@dataclass(frozen=True)
class Texts:
    """Texts of one task in one shard set."""

    dataset: str
    task: str
    count: int
    media: int
    chars: float
    """Mean length."""
    longest: int
    """Greatest length, in characters."""
    from_paper: bool
    """Whether the shards are missing and these are the paper's numbers."""


def texts_of(
    config: RunConfig, run: Path, modality: str, split: str, tasks: Sequence[str]
) -> list[Texts]:
    """Return what a modality's shard sets hold, of some tasks.

    Raises:
        InputError: if shards are missing and they are none of the paper's.
    """
    found = []
    for folder in data_folders(config, run, modality):
        try:
            index = read_index(folder / split)
        except InputError:
            found += _nominal(folder.name, split, tasks)
            continue
        codes, chars = index.samples.tasks, index.samples.chars
        for task in tasks:
            lengths = chars[codes == TASKS.index(task)]
            if len(lengths):
                media = index.counts["samples"]
                size = (float(lengths.mean()), int(lengths.max()))
                found.append(Texts(index.dataset, task, len(lengths), media, *size, False))
    return found


def _nominal(name: str, split: str, tasks: Sequence[str]) -> list[Texts]:
    if name not in TABLE_6:
        raise InputError(f"the shards of '{name}' are missing, so its size is not known")
    task, count, chars = TABLE_6[name]
    if task not in tasks:
        return []
    count = count if split == "train" else TEST_ITEMS
    return [Texts(name, task, count, count, float(chars), 4 * chars, True)]


def text_tokens(prompt: PromptConfig, instruction: str, task: str, chars: float) -> float:
    """Return the text tokens of a row, its frame and instruction included."""
    asked = instruction if task == "caption" else prompt.qa_suffix or ""
    return FRAME_TOKENS[prompt.style] + (len(asked) + chars) / CHARS_PER_TOKEN


def forward_flops(shape: Shape, length: float, lora_rank: int = 0) -> float:
    """Return the operations of one token's way through the blocks of a row of that length."""
    attention = 2 * shape.layers * shape.heads * shape.head_width * length  # half is masked
    return 2 * (shape.linear + shape.lora(lora_rank)) + attention


def training_flops(
    shape: Shape,
    length: float,
    labels: float,
    lora_rank: int,
    recompute: bool,
    full: bool = False,
) -> float:
    """Return the operations of a row of that length, forward and backward.

    No gradient of a frozen weight is formed (`full`: none is frozen), and the head sees label
    positions only. What is computed again counts if `recompute`; without it this is what a
    utilisation is measured by.
    """
    attention = 2 * shape.layers * shape.heads * shape.head_width * length
    per_weight = 6 if full else 4
    backbone = per_weight * shape.linear + 3 * attention
    trained = 6 * shape.lora(lora_rank)
    again = forward_flops(shape, length, lora_rank) if recompute else 0
    return length * (backbone + trained + again) + labels * per_weight * shape.embedding


def judge_dollars(config: RunConfig, items: int, chars: float) -> float | None:
    """Return what judging so many answers costs at most; None for an offline judge.

    Args:
        config: the run's.
        items: number of questions.
        chars: mean length of a question with its answer.
    """
    from mera_ds.evaluate.judge_prompt import SYSTEM_PROMPT
    from mera_ds.evaluate.openai_judge import BYTES_PER_TOKEN, MAX_REPLY_TOKENS, PRICES

    settings = config.evaluate
    if settings.judge != "openai":
        return None
    prices: Any = settings.judge_prices
    if not prices:
        known = PRICES.get(settings.judge_model)
        if known is None:
            return None
        prices = (known.input, known.output)
    # The prompt repeats the question and names the right answer and the given one.
    asked = (len(SYSTEM_PROMPT) + 200 + 2 * chars) / BYTES_PER_TOKEN
    return items * (asked * prices[0] + MAX_REPLY_TOKENS * prices[1]) / 1e6
