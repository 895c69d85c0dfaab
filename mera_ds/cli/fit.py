"""`mera-ds shards lint --run | --profile`: do the shard sets fit this run?"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mera_ds.cli.launch import DEFAULT_RUN
from mera_ds.config import RunConfig, load_config, load_profile, resolve_path
from mera_ds.errors import InputError
from mera_ds.registry import load_plugins
from mera_ds.shards.remote import data_folder


class RunFit:
    """Checks texts with the tokenizer, prompts, encoders and connectors of a run."""

    def __init__(self, run: Path | None, profile: str | None) -> None:
        """Read the configuration.

        Raises:
            InputError: there is no such run or profile, or both are given.
        """
        if run is not None and profile is not None:
            raise InputError("give --run or --profile, not both")
        self._run = run or Path(DEFAULT_RUN)
        self._config: RunConfig = load_profile(profile) if profile else load_config(self._run)
        load_plugins(self._config, self._run)

    def folders(self) -> list[Path]:
        """Return the shard folders that the run uses."""
        return [folder for modality in self._config.modalities for folder in self._data(modality)]

    def uses(self, folder: Path) -> bool:
        """Say whether `<dataset>/<split>` is one of the run's shard sets."""
        return bool(self._modalities(folder))

    def problems(self, folder: Path) -> list[str]:
        """Return what does not fit in one of the run's shard sets.

        Raises:
            InputError: the run's weights are missing.
        """
        from mera_ds.data.fit import text_problems

        return [
            problem
            for modality in self._modalities(folder)
            for problem in text_problems(
                folder,
                self._prompts,
                self._config.modalities[modality].caption_prompt,
                self._medium_tokens(modality),
                self._config.prompt.max_length,
            )
        ]

    def _modalities(self, folder: Path) -> list[str]:
        return [
            modality
            for modality in self._config.modalities
            if folder.parent.resolve() in [path.resolve() for path in self._data(modality)]
        ]

    def _data(self, modality: str) -> Sequence[Path]:
        data = self._config.modalities[modality].data
        return [data_folder(text, self._run) for text in data]

    @functools.cached_property
    def _backbone(self) -> Path:
        return resolve_path(self._config.backbone.path, self._run)

    @functools.cached_property
    def _prompts(self) -> Any:
        from mera_ds.data.prompts import PromptBuilder
        from mera_ds.model.backbone import load_tokenizer

        return PromptBuilder(self._config.prompt, load_tokenizer(self._backbone))

    @functools.cached_property
    def _medium_tokens(self) -> Callable[[str], int]:
        """Return a function: modality -> most tokens of a medium behind its connector."""
        from transformers import AutoConfig

        from mera_ds.model.build import build_encoders
        from mera_ds.model.connectors import build_connector

        width = AutoConfig.from_pretrained(self._backbone, local_files_only=True).hidden_size

        @functools.cache
        def count(modality: str) -> int:
            encoder = build_encoders(self._config, self._run, [modality])[modality]
            component = self._config.modalities[modality].connector
            connector = build_connector(
                component.kind, component.options, encoder.feature_dim, width, None
            )
            return connector.num_tokens(encoder.max_tokens)

        return count
