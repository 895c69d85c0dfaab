"""Packed rows and shared prefixes through the engine: the padded curve, with fewer positions."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from .problem import losses
from .processes import train_command

DROPOUT = "modalities.audio.connector.options.dropout=0.0"
VARIANTS = {
    "padded": (1, ()),
    "packed": (2, ("execution.packing=true",)),
    "shared": (2, ("execution.shared_prefix=true",)),
}
"""Ranks, and settings of the execution."""


@pytest.fixture(scope="module")
def runs(make_tiny_run: Callable[..., Path]) -> dict[str, Path]:
    """Return a run per variant that has learned sounds, of equal data in equal order."""
    found = {}
    for name, (ranks, settings) in VARIANTS.items():
        order = ("order=[audio]", "tune.max_steps=5", "tune.texts_together=3")
        run = make_tiny_run(*order, "align.max_steps=3", DROPOUT)
        phases = ("align", "tune")
        for ended in train_command(run, "audio", *settings, ranks=ranks, phases=phases).wait():
            assert ended.exit_code == 0, ended.log
        found[name] = run
    return found


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["packed", "shared"])
def test_the_loss_curve_is_that_of_padded_rows(runs: dict[str, Path], variant: str) -> None:
    assert len(losses(runs["padded"])) == 5
    for phase in ("01-audio/align", "01-audio/tune"):
        expected = losses(runs["padded"], phase)
        np.testing.assert_allclose(losses(runs[variant], phase), expected, rtol=2e-5)


@pytest.mark.slow
def test_the_metrics_say_what_was_saved(runs: dict[str, Path]) -> None:
    saved = {name: _saved(run) for name, run in runs.items()}
    assert saved["padded"] == 0
    assert 0.02 < saved["packed"] < saved["shared"] - 0.1


def _saved(run: Path) -> float:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return float(np.mean([row["positions_saved"] for row in rows if row["name"].endswith("tune")]))
