"""What a diagnosis measures a model by: the loss on texts of its test sets, or the scores it lost.

A measure is small where a model is good. The loss needs no generation; the scores are what the
paper compares, and the loss of a test does not always go with them.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from mera_ds.batch import Batch
from mera_ds.checkpoint import read_manifest
from mera_ds.config import RunConfig, resolve_path
from mera_ds.data.dataset import ModalityData, UnitReader
from mera_ds.data.prompts import PromptBuilder
from mera_ds.distributed import World
from mera_ds.errors import InputError
from mera_ds.evaluate.generate import predict_test, prediction_settings
from mera_ds.evaluate.items import test_tasks
from mera_ds.evaluate.loss import mean_loss
from mera_ds.evaluate.predictions import load_predictions, scored_tests
from mera_ds.evaluate.run import has_scores_of_now
from mera_ds.evaluate.score import score_test
from mera_ds.files import sha256_json
from mera_ds.model.backbone import load_tokenizer
from mera_ds.model.mllm import MultimodalLM
from mera_ds.plan import EvaluateStep, load_plan
from mera_ds.settings import dump

Opened = tuple[ModalityData, UnitReader]
"""The test split of a modality."""


class Measure(Protocol):
    """Measures a modality of a model that was put together from two products."""

    def __call__(
        self, model: MultimodalLM, modality: str, backbone: Path, connector: Path
    ) -> float:
        """Return the measure of the model, whose backbone and connector are those of products."""


class Loss:
    """The mean loss per supervised token."""

    def __init__(self, batches: Mapping[str, Sequence[Batch]]) -> None:
        """Take the texts of each modality."""
        self._batches = batches

    def __call__(
        self, model: MultimodalLM, modality: str, backbone: Path, connector: Path
    ) -> float:
        """Return the loss; where the weights come from makes no difference."""
        return mean_loss(model, self._batches[modality])


class ScoreLost:
    """How much of its scores a modality has lost since they were first measured, in per cent.

    That is 100 % − mean over the tests of S / S_first; below 0 the scores are better than then.
    Scores that an evaluation of the run has found are taken from it. Other predictions are kept in
    the run's folder `diagnosis`; a killed call goes on behind the last stored batches.
    """

    def __init__(
        self, run: Path, config: RunConfig, tests: Mapping[str, Opened], world: World
    ) -> None:
        """Take the test split of each modality."""
        self._run = run
        self._config = config
        self._tests = tests
        self._world = world
        self._tokenizer = load_tokenizer(resolve_path(config.backbone.path, run))
        self._prompts = PromptBuilder(config.prompt, self._tokenizer)
        comparable = {
            step.stage
            for step in load_plan(run / "plan.json").steps
            if isinstance(step, EvaluateStep) and has_scores_of_now(run, config, step)
        }
        self._evaluated = {
            (row["model"], row["modality"], row["dataset"], row["task"]): float(row["score"])
            for row in (test.row for test in scored_tests(run))
            if row["stage"] in comparable
        }
        self._first: dict[str, dict[tuple[str, str], float]] = {}

    def __call__(
        self, model: MultimodalLM, modality: str, backbone: Path, connector: Path
    ) -> float:
        """Return the per cent lost.

        Raises:
            InputError: the modality scored 0 on all its tests when it was first measured.
        """
        data, _ = self._tests[modality]
        scores = {
            test: self._score(model, modality, test, backbone, connector)
            for test in test_tasks(data)
        }
        first = self._first.setdefault(modality, scores)
        kept = [scores[test] / score for test, score in first.items() if score > 0]
        if not kept:
            raise InputError(
                f"{modality} scored 0 on all its tests when it was learnt, so there is nothing to "
                "lose; leave out --scores, which compares losses"
            )
        return 100 * (1 - statistics.fmean(kept))

    def _score(
        self,
        model: MultimodalLM,
        modality: str,
        test: tuple[str, str],
        backbone: Path,
        connector: Path,
    ) -> float:
        whole = read_manifest(backbone)
        entry = read_manifest(connector).connectors[modality]
        if whole.connectors[modality].sha256 == entry.sha256:
            known = self._evaluated.get((whole.model_sha256, modality, *test))
            if known is not None:
                return known
        data, reader = self._tests[modality]
        caption = self._config.modalities[modality].caption_prompt
        settings = [dump(self._config.prompt), caption, prediction_settings(self._config.evaluate)]
        facts = [whole.model_sha256, entry.sha256, settings, data.fingerprint]
        folder = self._run / "diagnosis" / sha256_json(facts)[:16]
        file = folder / f"{test[0]}-{test[1]}.jsonl"
        if not file.exists():
            predict_test(
                *(file, self._config, model, self._tokenizer, self._prompts.end_ids),
                *(reader, data, test, self._world),
            )
        figures = score_test(test[1], load_predictions(file), self._config.evaluate).figures
        return float(figures["score"])
