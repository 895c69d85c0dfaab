"""The learning rate at each step."""

import dataclasses

import pytest

from mera_ds.errors import InputError
from mera_ds.plan import LORA
from mera_ds.train.schedule import learning_rate_factor, peak_rates

from .problem import SETTINGS

CONNECTOR = "connector:audio"


def test_warm_up_is_linear_and_then_a_cosine_falls() -> None:
    phase = dataclasses.replace(SETTINGS, warmup_ratio=0.3, schedule="cosine")
    factors = [learning_rate_factor(phase, step, 10) for step in range(10)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert factors[3] - factors[4] == pytest.approx(0.0495, abs=1e-4)
    assert 0 < factors[9] < 0.06


def test_a_constant_rate_stays() -> None:
    phase = dataclasses.replace(SETTINGS, warmup_ratio=0.1, schedule="constant")
    assert [learning_rate_factor(phase, step, 10) for step in range(10)] == [0.5, *[1.0] * 9]


def test_each_set_has_its_own_peak() -> None:
    phase = dataclasses.replace(SETTINGS, lr_connector=1e-3, lr_backbone=2e-4)
    rates = peak_rates(phase, ("connector:image", CONNECTOR, LORA), {CONNECTOR: 0.1})
    assert rates == pytest.approx({"connector:image": 1e-3, CONNECTOR: 1e-4, LORA: 2e-4})


def test_a_connector_rate_is_not_used_for_the_backbone() -> None:
    phase = dataclasses.replace(SETTINGS, lr_backbone=None)
    with pytest.raises(InputError, match="lr_backbone is not set"):
        peak_rates(phase, (CONNECTOR, LORA), {})
    assert set(peak_rates(phase, (CONNECTOR,), {})) == {CONNECTOR}
