"""Plans as data: the JSON file, what is refused in it, and what can be asked of a plan."""

import json
from pathlib import Path
from typing import Any

import pytest

from mera_ds.config import load_profile
from mera_ds.errors import InputError
from mera_ds.methods import METHODS, make_plan
from mera_ds.plan import (
    DataPart,
    EvaluateStep,
    MergeStep,
    Plan,
    TrainStep,
    load_plan,
    save_plan,
)

ALIGN = TrainStep(
    name="01-image/align",
    stage=1,
    modality="image",
    phase="align",
    start=None,
    trainable=("connector:image",),
    data=(DataPart(modality="image"),),
    output="stages/01-image/aligned",
)
MERGE = MergeStep(
    name="02-video/merge",
    stage=2,
    modality="video",
    start=ALIGN.output,
    coefficient="1/2",
    output="stages/02-video/merged",
)
EVALUATE = EvaluateStep(
    name="02-video/evaluate",
    stage=2,
    modality="video",
    start=MERGE.output,
    modalities=("image", "video"),
    output="stages/02-video/evaluation",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a stored plan with a step of each kind."""
    path = tmp_path / "plan.json"
    save_plan(Plan(method="mine", steps=(ALIGN, MERGE, EVALUATE)), path)
    return path


def changed(path: Path, *keys: str | int, value: Any) -> Path:
    """Set one value in a JSON file; None removes the key."""
    plan = target = json.loads(path.read_text())
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    if value is None:
        del target[keys[-1]]
    path.write_text(json.dumps(plan))
    return path


def test_a_stored_plan_comes_back(path: Path) -> None:
    assert load_plan(path) == Plan(method="mine", steps=(ALIGN, MERGE, EVALUATE))


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_of_every_method_comes_back(tmp_path: Path, method: str) -> None:
    plan = make_plan(load_profile("tiny", [f"method={method}"]))
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("schema",), 2, r"plan\.json\.schema is 2; valid: 1"),
        (("schema",), None, r"plan\.json: missing key 'schema'"),
        (("method",), None, r"plan\.json: missing key 'method'"),
        (("methods",), "x", r"plan\.json: key 'methods'.*did you mean 'method'"),
        (("steps",), "x", r"plan\.json\.steps is 'x'; expected a list"),
        (("steps", 0), 5, r"plan\.json\.steps\[0\] is 5; expected a mapping"),
        (("steps", 1, "kind"), "mrege", r"step 1 is of unknown kind 'mrege'"),
        (("steps", 1, "kind"), None, r"step 1 is of unknown kind"),
        (("steps", 1, "coefficient"), None, r"step 1: missing key 'coefficient'"),
        (("steps", 0, "trainables"), [], r"step 0: key 'trainables'.*did you mean 'trainable'"),
        (("steps", 0, "phase"), "merge", r"step 0\.phase is 'merge'; valid: align, tune, realign"),
        (("steps", 0, "data", 0, "percent"), "all", r"data\[0\]\.percent is 'all'; expected float"),
        (("steps", 2, "start"), "nowhere", r"02-video/evaluate starts from nowhere, made by no"),
        (("steps", 0, "start"), MERGE.output, r"01-image/align starts from stages/02-video/merged"),
        (("steps", 2, "name"), ALIGN.name, r"two steps are called 01-image/align"),
        (("steps", 2, "output"), MERGE.output, r"or write stages/02-video/merged"),
    ],
)
def test_what_is_wrong_is_named(
    path: Path, keys: tuple[str | int, ...], value: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_plan(changed(path, *keys, value=value))


@pytest.mark.parametrize("content", ["[]", "5", '"x"'])
def test_a_file_that_is_no_plan_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(InputError, match=r"plan\.json: expected a mapping"):
        load_plan(tmp_path / "plan.json")


def test_a_plan_knows_producers_stages_and_models() -> None:
    plan = make_plan(load_profile("tiny"))
    for step in plan.steps:
        assert plan.producer(step.output) == step
    assert [step.name for step in plan.of_stage("video")] == [
        "02-video/align",
        "02-video/tune",
        "02-video/merge",
        "02-video/realign",
        "02-video/evaluate",
    ]
    assert plan.final_model("image") == "stages/01-image/model"
    assert plan.final_model("video") == "stages/02-video/model"


def test_the_default_merge_is_written_as_ever(tmp_path: Path) -> None:
    """Plans and keys of the moving average are those of runs that know no other method."""
    save_plan(make_plan(load_profile("tiny")), tmp_path / "plan.json")
    steps = json.loads((tmp_path / "plan.json").read_text())["steps"]
    (merge, *_) = (step for step in steps if step["kind"] == "merge")
    names = {"kind", "name", "stage", "modality", "start", "coefficient", "output"}
    assert set(merge) == names


def test_another_merge_method_comes_back(tmp_path: Path) -> None:
    plan = make_plan(load_profile("tiny", ["merge.method=ties", "merge.options.density=0.5"]))
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
