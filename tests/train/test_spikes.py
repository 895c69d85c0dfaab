"""Loss spikes are found, named, and change nothing."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

from mera_ds.train.spikes import LEAST, SpikeWatch

from .processes import Ranks


def spikes(losses: list[float]) -> list[int]:
    watch = SpikeWatch()
    return [step for step, loss in enumerate(losses) if watch.is_spike(loss)]


def test_ten_times_the_median_is_a_spike() -> None:
    assert spikes([5.0, 4.0, 6.0, 5.0, 49.0, 51.0, 5.0]) == [5]


def test_a_few_steps_must_have_been_seen() -> None:
    assert spikes([*[1.0] * (LEAST - 1), 99.0]) == []


def test_what_is_not_finite_is_counted_elsewhere() -> None:
    assert spikes([1.0, 1.0, math.nan, 1.0, math.inf, 1.0, 99.0]) == [6]


def test_a_lasting_rise_is_named_until_it_is_the_rule() -> None:
    found = spikes([1.0] * 4 + [20.0] * 10)
    assert found == [4, 5, 6, 7]


def _train_with_low_tolerance(run: Path) -> None:
    import mera_ds.train.spikes
    from mera_ds.cli.launch import train_stage

    mera_ds.train.spikes.FACTOR = 0.5
    sys.argv = ["stage.py", "--run-folder", str(run), "--modality", "image"]
    sys.exit(train_stage(("align",)))


def test_training_names_step_and_samples_and_goes_on(make_tiny_run: Callable[..., Path]) -> None:
    run = make_tiny_run("order=[image]", f"align.max_steps={LEAST + 1}", "align.batch_size=4")
    (ended,) = Ranks(_train_with_low_tolerance, 1, run).wait()
    assert ended.exit_code == 0, ended.log
    assert f"step {LEAST}: the loss " in ended.log
    assert "times that of the steps before: image/image-" in ended.log
