"""What the bare backbone says without media: a floor that a model has to be above.

The prompts are those of the evaluation, with nothing where the tokens of a medium stand. What such
a backbone gets right, it gets from the question and from what answers are usual.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mera_ds.config import RunConfig, resolve_path
from mera_ds.data.dataset import TEST, ModalityData, UnitReader
from mera_ds.data.prompts import PromptBuilder
from mera_ds.distributed import World, main_rank_alone, main_rank_first, share
from mera_ds.evaluate.generate import predict_test, prediction_settings
from mera_ds.evaluate.items import test_tasks
from mera_ds.evaluate.predictions import WITHOUT_MEDIA, load_predictions
from mera_ds.evaluate.score import score_test
from mera_ds.files import sha256_json, write_json
from mera_ds.identity import base_sha256, data_folders
from mera_ds.log import logger
from mera_ds.machine import commit, hardware
from mera_ds.model.backbone import load_tokenizer
from mera_ds.model.build import build_model
from mera_ds.model.connectors import Connector
from mera_ds.model.mllm import MultimodalLM
from mera_ds.settings import dump


class NoTokens(Connector):
    """Gives no token for any medium."""

    def __init__(self, width: int) -> None:
        """Take the backbone's width D."""
        nn.Module.__init__(self)
        self.feature_dim = 1
        self.nothing = nn.Parameter(torch.empty(0, width), requires_grad=False)

    def num_tokens(self, n_features: int) -> int:
        """Return 0."""
        return 0

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """Return (B, 0, D)."""
        return self.nothing.expand(len(values), *self.nothing.shape)

    def token_mask(self, mask: Tensor) -> Tensor:
        """Return (B, 0)."""
        return mask[:, :0]


def score_without_media(run: Path, config: RunConfig, world: World) -> list[dict[str, Any]]:
    """Generate and score on all tests of a run's modalities; write and return the rows.

    Every rank must call it. A killed call goes on behind the last stored batches.

    Raises:
        InputError: if the backbone or a test's shards are missing.
    """
    llm = build_model(config, run, None, (), {}).llm
    embedding = llm.get_input_embeddings()
    rows: list[dict[str, Any]] = []
    for modality in config.order:
        connector = NoTokens(embedding.embedding_dim).to(embedding.weight.dtype)
        model = MultimodalLM(llm, {modality: connector}, {}, config.prompt.max_length)
        model.to(world.device).eval()
        rows += _score_modality(run, config, modality, model, world)
    with main_rank_first(world) as mine:
        if mine:
            facts = {"schema": 1, "commit": commit(), "hardware": hardware()}
            write_json(run / WITHOUT_MEDIA, facts | {"rows": rows})
    return rows


def _score_modality(
    run: Path, config: RunConfig, modality: str, model: MultimodalLM, world: World
) -> list[dict[str, Any]]:
    data = ModalityData(modality, data_folders(config, run, modality), TEST)
    tokenizer = load_tokenizer(resolve_path(config.backbone.path, run))
    prompts = PromptBuilder(config.prompt, tokenizer)
    entry = config.modalities[modality]
    reader = UnitReader(data, entry, prompts, lambda unit: torch.zeros(1, 1), encoded=True)
    rows: list[dict[str, Any]] = []
    for dataset, task in test_tasks(data):
        file = _folder(run, config, data) / f"{dataset}-{task}.jsonl"
        if not share(file.exists()):
            predict_test(
                *(file, config, model, tokenizer, prompts.end_ids, reader, data),
                *((dataset, task), world),
            )
        figures: dict[str, Any] = {}
        with main_rank_alone(world) as mine:
            if mine:
                scored = score_test(task, load_predictions(file), config.evaluate)
                figures = dict(scored.figures)
        rows.append({"modality": modality, "task": task, "dataset": dataset, **share(figures)})
        logger.info("%s-%s without media: %.4g", dataset, task, rows[-1]["score"])
    return rows


def _folder(run: Path, config: RunConfig, data: ModalityData) -> Path:
    """Return where predictions lie that depend on the same things."""
    settings = prediction_settings(config.evaluate)
    caption = config.modalities[data.modality].caption_prompt
    facts = [base_sha256(config, run), dump(config.prompt), caption, settings, data.fingerprint]
    return run / "without-media" / sha256_json(facts)[:16]
