"""What steps are taken to cost, for the time that is left."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mera_ds.plan import FisherStep
from mera_ds.sequence import cost, open_run


@pytest.mark.parametrize(
    "settings",
    [
        ("method=ewc", "ewc.percent=5"),
        ("merge.method=fisher", "merge.fisher=data", "merge.fisher_percent=5"),
    ],
)
def test_measuring_importance_costs_its_share_of_a_tune(
    make_tiny_run: Callable[..., Path], settings: tuple[str, ...]
) -> None:
    run = open_run(make_tiny_run("order=[image, audio]", *settings))
    costs = {step.name.rpartition("/")[2]: cost(run, step) for step in run.plan.steps}
    assert any(isinstance(step, FisherStep) for step in run.plan.steps)
    assert costs["fisher"] == pytest.approx(0.05 * costs["tune"])
