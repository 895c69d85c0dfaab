"""Predictions: one JSON line per item, stored apart from scores so that scoring can be repeated."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mera_ds.config import Decode, EvaluateConfig
from mera_ds.data.dataset import ModalityData, UnitReader, UnitRef
from mera_ds.errors import DataError
from mera_ds.files import write_bytes
from mera_ds.log import logger
from mera_ds.model.mllm import MultimodalLM


@dataclass(frozen=True)
class Prediction:
    """What the model said about one test item."""

    id: str
    question: str
    references: tuple[str, ...]
    prediction: str


@dataclass(frozen=True)
class Item:
    """One test item: for captions a medium with all its captions, for QA one question."""

    unit: UnitRef
    question: str
    references: tuple[str, ...]


def test_items(data: ModalityData, dataset: str, task: str, limit: int | None) -> list[Item]:
    """Return the items of a task: each medium once for captions, each question once for QA."""
    items: dict[object, Item] = {}
    for unit in data.units([task]):
        if data.dataset(unit) != dataset:
            continue
        text = data.text(unit)
        identity = (unit.reader, unit.medium) if task == "caption" else unit
        before = items[identity].references if identity in items else ()
        first = items[identity].unit if identity in items else unit
        items[identity] = Item(first, text.question, (*before, *text.answers))
    return list(items.values())[:limit]


def predict(
    model: MultimodalLM,
    tokenizer: Any,
    data: ModalityData,
    reader: UnitReader,
    items: Sequence[Item],
    config: EvaluateConfig,
    end_ids: Collection[int] = (),
    decode: Decode = "eager",
) -> list[Prediction]:
    """Generate greedily for all items, in batches of similar prompt length.

    Media are read batch by batch: those of a whole test set would not fit in memory.

    `end_ids` are tokens that end a text beside the tokenizer's own (`PromptBuilder.end_ids`).
    """
    lengths = [len(reader.pieces(item.unit, supervised=False).suffix) for item in items]
    order = sorted(range(len(items)), key=lengths.__getitem__)
    texts = [""] * len(items)
    for start in range(0, len(order), config.batch_size):
        chosen = order[start : start + config.batch_size]
        batch = [reader.read(items[n].unit, supervised=False) for n in chosen]
        said = model.generate(batch, config.max_new_tokens, tokenizer, end_ids, decode)
        for number, text in zip(chosen, said, strict=True):
            texts[number] = text
    logger.info("%s: %d predictions", data.modality, len(items))
    return [
        Prediction(data.unit_id(item.unit), item.question, item.references, text)
        for item, text in zip(items, texts, strict=True)
    ]


def save_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions as JSON lines, atomically."""
    lines = [json.dumps(asdict(entry), ensure_ascii=False) for entry in predictions]
    write_bytes(path, ("\n".join(lines) + "\n").encode())


def load_predictions(path: Path) -> list[Prediction]:
    """Read stored predictions.

    Raises:
        DataError: naming the line that is not a prediction.
    """
    found = []
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):  # splitlines() would cut at U+2028, too
        try:
            value = json.loads(line)
            found.append(Prediction(**{**value, "references": tuple(value["references"])}))
        except (json.JSONDecodeError, TypeError, KeyError):
            raise DataError(f"{path}:{number} is no prediction; delete the file") from None
    return found
