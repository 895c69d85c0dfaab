"""Training on features that were computed before, and on media that are encoded on line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from .problem import losses
from .processes import train_command

DROPOUT = "modalities.audio.connector.options.dropout=0.0"


@pytest.mark.slow
def test_the_loss_curve_is_the_same(make_tiny_run: Callable[..., Path]) -> None:
    found = {}
    for features in ("cached", "online"):
        run = make_tiny_run("order=[audio]", "align.max_steps=4", "tune.max_steps=4", DROPOUT)
        command = train_command(
            run, "audio", f"execution.features={features}", phases=("align", "tune")
        )
        (ended,) = command.wait()
        assert ended.exit_code == 0, ended.log
        found[features] = [
            loss for phase in ("01-audio/align", "01-audio/tune") for loss in losses(run, phase)
        ]
    assert len(found["online"]) == 8
    np.testing.assert_allclose(found["cached"], found["online"], rtol=1e-5)
