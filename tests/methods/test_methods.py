"""The plans that the methods write, as data."""

import dataclasses
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest

from mera_ds.config import load_profile
from mera_ds.errors import InputError
from mera_ds.methods import METHODS, make_plan
from mera_ds.methods import REALIGNED as REALIGNED_NAMES
from mera_ds.plan import (
    EvaluateStep,
    FisherStep,
    MergeStep,
    Penalty,
    Plan,
    Step,
    TrainStep,
    load_plan,
    save_plan,
)

ORDER = ("audio", "image", "pointcloud", "video")
LEARN = ["align", "tune"]
KINDS = {
    "finetune": [*LEARN, "evaluate"],
    "expert": [*LEARN, "evaluate"],
    "replay": [*LEARN, "evaluate"],
    "ewc": ["fisher", *LEARN, "evaluate"],
    "pathweave": [*LEARN, "evaluate"],
    "merge": [*LEARN, "merge", "evaluate"],
    "mera": [*LEARN, "merge", "realign", "evaluate"],
    "realign": [*LEARN, "realign", "evaluate"],
    "replay+realign": [*LEARN, "realign", "evaluate"],
    "ewc+realign": ["fisher", *LEARN, "realign", "evaluate"],
    "pathweave+realign": [*LEARN, "realign", "evaluate"],
}
STAGED = [name for name in KINDS if name != "expert"]
REALIGNED = [name for name, kinds in KINDS.items() if "realign" in kinds]


def test_these_are_the_methods() -> None:
    assert set(METHODS) == set(KINDS)


def plan_of(method: str, *overrides: str) -> Plan:
    order = f"order=[{', '.join(ORDER)}]"
    return make_plan(load_profile("tiny", [f"method={method}", order, *overrides]))


def only(plan: Plan, modality: str, kind: str) -> Step:
    """Return the step `<stage>-<modality>/<kind>`."""
    (step,) = (step for step in plan.of_stage(modality) if step.name.endswith(f"/{kind}"))
    return step


def train(plan: Plan, modality: str, phase: str) -> TrainStep:
    step = only(plan, modality, phase)
    assert isinstance(step, TrainStep)
    assert step.phase == phase
    return step


@pytest.mark.parametrize("method", METHODS)
def test_stages_follow_the_order_and_have_the_steps_of_the_method(method: str) -> None:
    plan = plan_of(method)
    first = [*LEARN, "evaluate"]
    expected = [
        f"{number:02d}-{modality}/{kind}"
        for number, modality in enumerate(ORDER, start=1)
        for kind in (first if number == 1 else KINDS[method])
    ]
    assert [step.name for step in plan.steps] == expected
    for step in plan.steps:
        assert ORDER[step.stage - 1] == step.modality
        assert step.output.startswith(f"stages/{step.stage:02d}-{step.modality}/")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("modality", ORDER)
def test_a_modality_is_learnt_by_its_connector_then_with_lora(method: str, modality: str) -> None:
    align, tune = (train(plan_of(method), modality, phase) for phase in ("align", "tune"))
    assert align.trainable == (f"connector:{modality}",)
    assert tune.trainable[-2:] == (f"connector:{modality}", "lora")
    assert tune.start == align.output
    for step in (align, tune):
        assert (step.data[-1].modality, step.data[-1].percent) == (modality, 100.0)


@pytest.mark.parametrize("method", sorted({*METHODS} - {"replay", "replay+realign"}))
def test_other_methods_than_replay_see_old_data_only_to_realign(method: str) -> None:
    for modality in ORDER:
        for step in (train(plan_of(method), modality, phase) for phase in LEARN):
            assert [part.modality for part in step.data] == [modality]
            assert len(step.trainable) == (1 if step.phase == "align" else 2)


@pytest.mark.parametrize("method", STAGED)
def test_a_stage_starts_from_the_model_of_the_last(method: str) -> None:
    plan = plan_of(method)
    starts = [train(plan, modality, "align").start for modality in ORDER]
    assert starts == [None, *(plan.final_model(modality) for modality in ORDER[:-1])]
    for number, modality in enumerate(ORDER, start=1):
        evaluate = only(plan, modality, "evaluate")
        assert isinstance(evaluate, EvaluateStep)
        assert evaluate.start == plan.final_model(modality)
        assert evaluate.modalities == ORDER[:number]


def test_an_expert_starts_from_the_bare_backbone_and_is_tested_on_its_modality() -> None:
    plan = plan_of("expert")
    for modality in ORDER:
        assert train(plan, modality, "align").start is None
        evaluate = only(plan, modality, "evaluate")
        assert isinstance(evaluate, EvaluateStep)
        assert evaluate.start == train(plan, modality, "tune").output
        assert evaluate.modalities == (modality,)


def test_the_first_stage_is_the_same_in_all_methods() -> None:
    plans = [plan_of(method).of_stage(ORDER[0]) for method in METHODS]
    assert all(plan == plans[0] for plan in plans)


@pytest.mark.parametrize("method", ["merge", "mera"])
def test_the_newest_delta_is_merged_with_one_by_the_number_of_the_stage(method: str) -> None:
    plan = plan_of(method)
    for stage, modality in enumerate(ORDER[1:], start=2):
        merge = only(plan, modality, "merge")
        assert isinstance(merge, MergeStep)
        assert Fraction(merge.coefficient) == Fraction(1, stage)
        assert merge.start == train(plan, modality, "tune").output


@pytest.mark.parametrize("method", REALIGNED)
def test_realigning_trains_all_connectors_so_far_on_all_modalities_so_far(method: str) -> None:
    plan = plan_of(method, "replay.percent=7")
    before = [kind for kind in KINDS[method] if kind in ("tune", "merge")][-1]
    for stage, modality in enumerate(ORDER[1:], start=2):
        realign = train(plan, modality, "realign")
        seen = ORDER[:stage]
        assert realign.start == only(plan, modality, before).output
        assert realign.trainable == tuple(f"connector:{name}" for name in seen)
        assert [(part.modality, part.percent) for part in realign.data] == [(m, 7.0) for m in seen]
        assert plan.final_model(modality) == realign.output


def test_replay_of_one_percent_can_be_realigned_with_ten() -> None:
    """As in the paper's Table 5."""
    plan = plan_of("replay+realign", "replay.percent=1", "replay.realign_percent=10")
    tune, realign = train(plan, ORDER[1], "tune"), train(plan, ORDER[1], "realign")
    assert [part.percent for part in tune.data] == [1.0, 100.0]
    assert [part.percent for part in realign.data] == [10.0, 10.0]


@pytest.mark.parametrize("name", ["finetune", "replay", "ewc", "pathweave", "merge"])
def test_realigning_changes_nothing_of_how_a_method_learns(name: str) -> None:
    alone, realigned = plan_of(name), plan_of(REALIGNED_NAMES[name])
    for modality in ORDER:
        for kind in (kind for kind in KINDS[name] if kind != "evaluate"):
            if kind not in LEARN and modality == ORDER[0]:
                continue
            mine, theirs = only(alone, modality, kind), only(realigned, modality, kind)
            assert dataclasses.replace(mine, output="", start="") == dataclasses.replace(
                theirs, output="", start=""
            )


@pytest.mark.parametrize("method", ["replay", "replay+realign"])
def test_replay_tunes_on_the_joint_data_with_all_connectors_so_far(method: str) -> None:
    plan = plan_of(method, "replay.percent=3")
    for stage, modality in enumerate(ORDER, start=1):
        tune = train(plan, modality, "tune")
        old = ORDER[: stage - 1]
        assert [(part.modality, part.percent) for part in tune.data] == [
            *((name, 3.0) for name in old),
            (modality, 100.0),
        ]
        connectors = [f"connector:{name}" for name in (*old, modality)]
        assert tune.trainable == (*connectors, "lora")
        assert [part.modality for part in train(plan, modality, "align").data] == [modality]


@pytest.mark.parametrize("method", ["ewc", "ewc+realign"])
def test_ewc_carries_lora_on_and_holds_it_by_what_the_stages_before_depend_on(method: str) -> None:
    plan = plan_of(method, "ewc.strength=0.5", "ewc.percent=2", "ewc.decay=0.9")
    assert train(plan, ORDER[0], "tune").adapter == "new"
    assert train(plan, ORDER[0], "tune").penalty is None
    earlier = None
    for old, modality in pairwise(ORDER):
        fisher, tune = only(plan, modality, "fisher"), train(plan, modality, "tune")
        assert isinstance(fisher, FisherStep)
        assert fisher.start == plan.final_model(old)
        assert [(part.modality, part.percent) for part in fisher.data] == [(old, 2.0)]
        assert (fisher.previous, fisher.decay) == (earlier, 0.9)
        assert tune.adapter == "carried"
        assert tune.penalty == Penalty(source=fisher.output, strength=0.5)
        earlier = fisher.output


@pytest.mark.parametrize("method", ["pathweave", "pathweave+realign"])
def test_pathweave_weaves_from_the_second_stage_on(method: str) -> None:
    plan = plan_of(method)
    adapters = [train(plan, modality, "tune").adapter for modality in ORDER]
    assert adapters == ["new", "woven", "woven", "woven"]


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_is_read_as_it_was_written(method: str, tmp_path: Path) -> None:
    save_plan(plan_of(method), tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan_of(method)


@pytest.mark.parametrize("method", METHODS)
def test_a_longer_order_begins_with_the_steps_of_the_shorter(method: str) -> None:
    """So that `mera-ds add` can go on with a finished run."""
    short = make_plan(load_profile("tiny", [f"method={method}", f"order=[{', '.join(ORDER[:3])}]"]))
    assert plan_of(method).steps[: len(short.steps)] == short.steps


def test_what_earlier_plans_did_not_say_is_not_written(tmp_path: Path) -> None:
    save_plan(plan_of("mera"), tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert "adapter" not in text
    assert "penalty" not in text


@pytest.mark.parametrize(
    "setting", ["ewc.strength=-1", "ewc.percent=0", "ewc.percent=101", "ewc.decay=1.1"]
)
def test_ewc_settings_have_ranges(setting: str) -> None:
    with pytest.raises(InputError, match=r"ewc\.strength=.* must be at least 0"):
        plan_of("ewc", setting)


def test_the_plan_does_not_depend_on_how_it_is_executed() -> None:
    assert plan_of("mera") == plan_of("mera", "execution.processes=4", "execution.zero=3", "seed=9")


def test_an_unknown_method_gets_the_nearest() -> None:
    with pytest.raises(InputError, match=r"method 'mear' is unknown; did you mean 'mera'"):
        plan_of("mear")


def test_another_merge_method_is_in_the_merge_steps_alone() -> None:
    settings = ("merge.method=scale", "merge.options.rule=constant")
    ours, default = plan_of("mera", *settings), plan_of("mera")
    for mine, theirs in zip(ours.steps, default.steps, strict=True):
        if isinstance(mine, MergeStep):
            assert (mine.method, mine.options) == ("scale", {"rule": "constant"})
            assert mine.coefficient == ""
        else:
            assert mine == theirs
