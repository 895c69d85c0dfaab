"""Every shipped profile: it is whole, and every method can make a plan of it."""

import pytest

from mera_ds.config import RunConfig, load_profile, profile_names
from mera_ds.methods import METHODS, make_plan
from mera_ds.model.connectors import CONNECTORS
from mera_ds.model.encoders import ENCODERS


@pytest.fixture(params=profile_names())
def config(request: pytest.FixtureRequest) -> RunConfig:
    """Return each profile in turn."""
    return load_profile(request.param)


def test_there_are_profiles() -> None:
    assert {"pocket", "tiny"} <= set(profile_names())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_plan(config: RunConfig, method: str) -> None:
    plan = make_plan(load_profile(config.profile, [f"method={method}"]))
    assert plan.method == method
    evaluated = [step.modality for step in plan.steps if step.kind == "evaluate"]
    assert evaluated == list(config.order)


def test_it_teaches_all_its_modalities_and_says_what_it_is(config: RunConfig) -> None:
    assert set(config.order) == set(config.modalities)
    assert config.description
    assert config.limits


def test_its_encoders_and_connectors_exist_and_take_its_options(config: RunConfig) -> None:
    from mera_ds.settings import parse

    for modality, entry in config.modalities.items():
        encoder, connector = ENCODERS[entry.encoder.kind], CONNECTORS[entry.connector.kind]
        parse(encoder.Options, entry.encoder.options, f"{modality}: encoder")
        parse(connector.Options, entry.connector.options, f"{modality}: connector")


def test_the_connector_trains_alone_wherever_the_backbone_is_frozen(config: RunConfig) -> None:
    assert config.align.lr_backbone is None
    assert config.realign.lr_backbone is None
    assert config.tune.lr_backbone is not None
