"""The plans that the methods write, as data."""

from fractions import Fraction

import pytest

from mera_ds.config import load_profile
from mera_ds.errors import InputError
from mera_ds.methods import METHODS, make_plan
from mera_ds.plan import EvaluateStep, MergeStep, Plan, Step, TrainStep

ORDER = ("audio", "image", "pointcloud", "video")
KINDS = {
    "finetune": ["align", "tune", "evaluate"],
    "expert": ["align", "tune", "evaluate"],
    "mera": ["align", "tune", "merge", "realign", "evaluate"],
}


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
    first = [kind for kind in KINDS[method] if kind not in ("merge", "realign")]
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
    assert tune.trainable == (f"connector:{modality}", "lora")
    assert tune.start == align.output
    for step in (align, tune):
        assert [(part.modality, part.percent) for part in step.data] == [(modality, 100.0)]


@pytest.mark.parametrize("method", ["finetune", "mera"])
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


def test_mera_merges_with_one_by_the_number_of_the_stage() -> None:
    plan = plan_of("mera")
    for stage, modality in enumerate(ORDER[1:], start=2):
        merge = only(plan, modality, "merge")
        assert isinstance(merge, MergeStep)
        assert Fraction(merge.coefficient) == Fraction(1, stage)
        assert merge.start == train(plan, modality, "tune").output


def test_mera_realigns_all_connectors_so_far_on_replay_data_of_all_modalities_so_far() -> None:
    plan = plan_of("mera", "replay.percent=7")
    for stage, modality in enumerate(ORDER[1:], start=2):
        realign = train(plan, modality, "realign")
        seen = ORDER[:stage]
        assert realign.start == only(plan, modality, "merge").output
        assert realign.trainable == tuple(f"connector:{name}" for name in seen)
        assert [(part.modality, part.percent) for part in realign.data] == [(m, 7.0) for m in seen]
        assert plan.final_model(modality) == realign.output


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
