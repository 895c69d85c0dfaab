"""Generation: what a model says about the items of a test, batch by batch."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mera_ds.config import Decode, EvaluateConfig, RunConfig
from mera_ds.data.dataset import ModalityData, UnitReader
from mera_ds.distributed import World
from mera_ds.evaluate.items import Item, test_items
from mera_ds.evaluate.parts import Generated, cut_into_parts, predict_in_parts
from mera_ds.evaluate.predictions import Prediction
from mera_ds.model.mllm import MultimodalLM


def prediction_settings(settings: EvaluateConfig) -> tuple[int | None, int, int]:
    """Return what predictions depend on of the settings; batches of other sizes round otherwise."""
    return settings.limit, settings.batch_size, settings.max_new_tokens


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
    decode: Decode = "eager"
    """See `ExecutionConfig.decode`."""

    def __call__(self, positions: Sequence[int]) -> list[str]:
        """Return what the model says about the items at some positions."""
        batch = [self.reader.read(self.items[n].unit, supervised=False) for n in positions]
        return self.model.generate(
            batch, self.max_new_tokens, self.tokenizer, self.end_ids, self.decode
        )


def predict_test(
    file: Path,
    config: RunConfig,
    model: MultimodalLM,
    tokenizer: Any,
    end_ids: Collection[int],
    reader: UnitReader,
    data: ModalityData,
    test: tuple[str, str],
    world: World,
) -> Generated:
    """Write what a model says about a test, given as dataset and task. Every rank must call it."""
    settings = config.evaluate
    items = test_items(data, *test, settings.limit)
    parts = cut_into_parts([len(item.question) for item in items], settings.batch_size)
    say = Speaker(
        *(model, tokenizer, reader, items, settings.max_new_tokens, end_ids),
        decode=config.execution.decode,
    )
    return predict_in_parts(file, questions(data, items), parts, say, world)
