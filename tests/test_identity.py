"""A step's key: it changes with whatever changes the product, and with nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mera_ds.checkpoint import write_product
from mera_ds.config import load_config, load_profile
from mera_ds.errors import InputError
from mera_ds.files import sha256_json
from mera_ds.identity import base_sha256, product_key, weights_path
from mera_ds.methods import make_plan
from mera_ds.plan import Step

MakeRun = Callable[..., Path]


def key(run: Path, name: str, *overrides: str) -> str:
    """Return the key of a step under a profile `tiny` that is changed by overrides."""
    config = load_profile("tiny", overrides)
    plan = make_plan(config)
    return product_key(config, run, plan, step_of(run, name, *overrides))


def step_of(run: Path, name: str, *overrides: str) -> Step:
    steps = make_plan(load_profile("tiny", overrides)).steps
    return next(step for step in steps if step.name == name)


def make_product(run: Path, name: str, product: str, *overrides: str) -> None:
    """Write a product for a step as if it had been trained; `product` is its key."""
    connectors = {"image": {"w": torch.ones(1)}}
    facts: dict[str, Any] = {"step": name, "base_sha256": "base", "previous": None}
    output = run / step_of(run, name, *overrides).output
    write_product(output, key=product, connectors=connectors, **facts)


@pytest.fixture(scope="module")
def run(make_tiny_run: MakeRun) -> Path:
    """Return a run in which the first align step is finished."""
    run = make_tiny_run()
    make_product(run, "01-image/align", "aligned")
    return run


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "align.lr_connector=1e-3",
        "align.batch_size=8",
        "align.max_steps=21",
        "align.tasks=[caption, qa]",
        "prompt.style=plain",
        "prompt.qa_suffix=Be short.",
        "prompt.align_style=bare",
        "prompt.max_length=128",
        "backbone.dtype=bf16",
        "modalities.image.encoder.options={seed: 1}",
        "modalities.image.connector.options.norm=none",
        "modalities.image.caption_prompt=What is it?",
        "modalities.image.lr_scale=0.5",
        "modalities.image.feature_dtype=fp16",
        "align.texts_together=4",
        "modalities.image.data=['{run}/data/image', '{run}/data/image']",
    ],
)
def test_it_changes_with_what_training_depends_on(run: Path, override: str) -> None:
    assert key(run, "01-image/align", override) != key(run, "01-image/align")


@pytest.mark.parametrize(
    "override",
    [
        "execution.zero=3",
        "execution.processes=4",
        "execution.workers=2",
        "execution.micro_batch_size=1",
        "execution.features=online",
        "execution.packing=true",
        "execution.shared_prefix=true",
        "align.texts_together=1",
        "profile=other",
        "description=other",
        "evaluate.max_new_tokens=1",
        "tune.lr_connector=1e-9",
        "lora.rank=2",
        "replay.percent=1",
        "method=finetune",
        "method=expert",
        "order=[image, audio]",
        "modalities.video.caption_prompt=other",
    ],
)
def test_it_does_not_change_with_anything_else(run: Path, override: str) -> None:
    assert key(run, "01-image/align", override) == key(run, "01-image/align")


def test_tuning_depends_on_its_start_and_on_lora(run: Path, make_tiny_run: MakeRun) -> None:
    other = make_tiny_run()
    make_product(other, "01-image/align", "aligned otherwise")
    keys = [
        key(run, "01-image/tune"),
        key(other, "01-image/tune"),
        key(run, "01-image/tune", "lora.rank=2"),
        key(run, "01-image/tune", "tune.lr_backbone=1e-9"),
    ]
    assert len(set(keys)) == 4


def test_the_folder_of_the_run_has_no_part_in_it(run: Path, make_tiny_run: MakeRun) -> None:
    assert key(make_tiny_run(), "01-image/align") == key(run, "01-image/align")


def test_an_expert_of_a_later_modality_is_no_stage_of_a_sequence(run: Path) -> None:
    make_product(run, "01-image/tune", "model of image")
    expert = key(run, "02-video/align", "method=expert")
    assert expert != key(run, "02-video/align", "method=finetune")


def test_merging_depends_on_the_coefficient_and_realigning_on_the_percentage(run: Path) -> None:
    make_product(run, "02-video/tune", "tuned")
    make_product(run, "02-video/merge", "merged")
    half = key(run, "02-video/merge")
    make_product(run, "03-audio/tune", "tuned")
    assert key(run, "03-audio/merge") != half
    few, many = (
        key(run, "02-video/realign", f"replay.percent={percent}") for percent in ("1", "10")
    )
    assert few != many


def write_one(path: Path, old: str, new: str) -> None:
    """Replace a text in a file, under a new inode as hard links must be left alone."""
    content = path.read_text()
    assert old in content
    path.unlink()
    path.write_text(content.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("backbone/config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
        ("backbone/chat_template.jinja", "<|end|>", "<|end|> "),
        ("backbone/tokenizer_config.json", '"eos_token": "<|end|>"', '"eos_token": "<|user|>"'),
        ("data/image/train/index.json", '"licence":"CC0-1.0"', '"licence":"other"'),
    ],
)
def test_it_changes_with_the_files(make_tiny_run: MakeRun, file: str, old: str, new: str) -> None:
    run = make_tiny_run()
    before = key(run, "01-image/align")
    write_one(run / file, old, new)
    assert key(run, "01-image/align") != before


def test_it_does_not_change_with_the_test_data(make_tiny_run: MakeRun) -> None:
    run = make_tiny_run()
    before = key(run, "01-image/align")
    write_one(run / "data/image/test/index.json", "CC0-1.0", "other")
    assert key(run, "01-image/align") == before


def test_a_step_without_its_start_names_what_to_run(make_tiny_run: MakeRun) -> None:
    run = make_tiny_run()
    with pytest.raises(
        InputError, match=r"01-image/tune starts from 01-image/align.*--until 01-image/align"
    ):
        key(run, "01-image/tune")


def test_missing_weights_shards_and_backbones_are_named(
    make_tiny_run: MakeRun, tmp_path: Path
) -> None:
    run = make_tiny_run()
    absent = f"modalities.image.encoder.weights={tmp_path}/gone.safetensors"
    with pytest.raises(InputError, match=r"weights of 'tiny-image' are missing: .*gone"):
        key(run, "01-image/align", absent)
    with pytest.raises(InputError, match="gone"):
        key(run, "01-image/align", "modalities.image.data=['{run}/gone']")
    with pytest.raises(InputError, match=r"gone holds no HF checkpoint"):
        key(run, "01-image/align", "backbone.path={run}/gone")


def test_weights_count_by_content_not_by_place(make_tiny_run: MakeRun, tmp_path: Path) -> None:
    run = make_tiny_run()
    keys = []
    for name, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(content)
        config = f"modalities.image.encoder.weights={tmp_path / name}"
        keys.append(key(run, "01-image/align", config))
    assert keys[0] == keys[1] != keys[2]


def test_paths_are_resolved_in_the_run(make_tiny_run: MakeRun) -> None:
    run = make_tiny_run("modalities.image.encoder.weights={run}/weights")
    (run / "weights").write_text("w")
    config = load_config(run)
    assert weights_path(config.modalities["image"].encoder, run) == run / "weights"
    assert base_sha256(config, run) == base_sha256(config, make_tiny_run())
    assert json.loads((run / "backbone" / "config.json").read_text())["model_type"] == "llama"


def test_a_merge_depends_on_its_method(run: Path) -> None:
    make_product(run, "02-video/tune", "tuned")
    default = key(run, "02-video/merge")
    # What runs have that were made before there were other methods.
    facts = {"kind": "merge", "stage": 2, "start": "tuned", "coefficient": "1/2"}
    assert default == sha256_json(facts)
    others = [("merge.method=opcm",), ("merge.method=opcm", "merge.options.alpha=0.7")]
    assert len({default, *(key(run, "02-video/merge", *other) for other in others)}) == 3
