"""The plan of merging with Fisher information that is measured on data."""

import pytest

from mera_ds.config import RunConfig, load_profile
from mera_ds.errors import InputError
from mera_ds.methods import make_plan
from mera_ds.plan import FisherStep, MergeStep, TrainStep, step_inputs

MEASURED = ("merge.method=fisher", "merge.fisher=data", "merge.fisher_percent=2")


def tiny(*overrides: str) -> RunConfig:
    return load_profile("tiny", ["method=mera", *overrides])


def test_every_stage_is_measured_behind_its_tune() -> None:
    config = tiny(*MEASURED)
    plan = make_plan(config)
    for modality in config.order:
        steps = plan.of_stage(modality)
        (place,) = (n for n, step in enumerate(steps) if isinstance(step, FisherStep))
        step, tune = steps[place], steps[place - 1]
        assert isinstance(step, FisherStep)
        assert isinstance(tune, TrainStep)
        assert (tune.phase, tune.output) == ("tune", step.start)
        assert [(part.modality, part.percent) for part in step.data] == [(modality, 2.0)]
        assert step.previous is None


def test_a_merge_needs_what_it_does_not_have_yet() -> None:
    """The second stage's needs the first's as well; later ones find it with the deltas."""
    plan = make_plan(tiny(*MEASURED))
    merges = [step for step in plan.steps if isinstance(step, MergeStep)]
    stages = [[plan.producer(name).stage for name in step.importance] for step in merges]
    assert stages == [[1, 2], [3], [4]]
    for step in merges:
        assert set(step.importance) < set(step_inputs(step))


def test_nothing_is_measured_otherwise() -> None:
    plan = make_plan(tiny("merge.method=fisher"))
    assert not any(isinstance(step, FisherStep) for step in plan.steps)
    assert all(not step.importance for step in plan.steps if isinstance(step, MergeStep))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("merge.fisher=data",), "merge.fisher=data is of no use to merge.method=cma"),
        ((*MEASURED, "merge.fisher_percent=0"), r"must be in \(0, 100\]"),
    ],
)
def test_settings_that_mean_nothing(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny(*overrides)
