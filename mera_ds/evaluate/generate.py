"""Predictions: one JSON line per item, stored apart from scores so that scoring can be repeated."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mera_ds.data.dataset import ModalityData, UnitReader
from mera_ds.errors import DataError
from mera_ds.evaluate.items import Item
from mera_ds.files import write_bytes
from mera_ds.model.mllm import MultimodalLM


@dataclass(frozen=True)
class Prediction:
    """What the model said about one test item."""

    id: str
    question: str
    references: tuple[str, ...]
    prediction: str


def questions(data: ModalityData, items: Sequence[Item]) -> list[Prediction]:
    """Return the items as predictions in which nothing is said yet."""
    return [
        Prediction(data.unit_id(item.unit), item.question, item.references, "") for item in items
    ]


@dataclass(frozen=True)
class Speaker:
    """Generates greedily for the items of one task, batch by batch.

    Media are read batch by batch: those of a whole test set would not fit in memory.
    """

    model: MultimodalLM
    tokenizer: Any
    reader: UnitReader
    items: Sequence[Item]
    max_new_tokens: int
    end_ids: Collection[int] = ()
    """Tokens that end a text beside the tokenizer's own (`PromptBuilder.end_ids`)."""

    def __call__(self, positions: Sequence[int]) -> list[str]:
        """Return what the model says about the items at some positions."""
        batch = [self.reader.read(self.items[n].unit, supervised=False) for n in positions]
        return self.model.generate(batch, self.max_new_tokens, self.tokenizer, self.end_ids)


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
