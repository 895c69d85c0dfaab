"""Offloading to a local disk: the same training, and what is refused."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mera_ds.config import REPOSITORY, ExecutionConfig
from mera_ds.errors import InputError
from mera_ds.files import read_json
from mera_ds.train.offload import require_disk_support
from mera_ds.train.setup import engine_config, prepare_environment

from .problem import Task, Trained, train_all, whole_change, worst_moment
from .processes import run_ranks

SETTINGS = REPOSITORY / "ds_configs" / "zero3-nvme.json"
RANK = 4096
"""Of LoRA: DeepSpeed leaves less than a megabyte in memory."""


def _execution(**changes: Any) -> ExecutionConfig:
    return ExecutionConfig(zero=3, ds_config=str(SETTINGS), **changes)


def test_the_folder_is_told_to_deepspeed(tmp_path: Path) -> None:
    config = engine_config(_execution(nvme_folder=str(tmp_path / "disk")), "bf16", 1.0)
    zero = config["zero_optimization"]
    assert zero["offload_optimizer"]["nvme_path"] == str(tmp_path / "disk")
    assert "nvme_path" not in zero["offload_param"]
    assert (tmp_path / "disk").is_dir()


def test_no_folder() -> None:
    with pytest.raises(InputError, match=r"zero3-nvme.json offloads to NVMe; .*nvme_folder=FOLDER"):
        engine_config(_execution(), "bf16", 1.0)


def test_a_folder_for_nothing(tmp_path: Path) -> None:
    execution = ExecutionConfig(zero=2, nvme_folder=str(tmp_path))
    with pytest.raises(InputError, match=r"zero2.json offloads nothing to NVMe"):
        engine_config(execution, "bf16", 1.0)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"execution.nvme_folder=.*/file/disk can't be made"):
        engine_config(_execution(nvme_folder=str(tmp_path / "file/disk")), "bf16", 1.0)


@pytest.mark.parametrize("state", ["method=ewc", "tune.optimizer=adamw8bit"])
def test_state_that_stays_in_memory_is_refused(state: str) -> None:
    with pytest.raises(InputError, match=f"what {state} keeps .*zero3-offload.json"):
        require_disk_support(read_json(SETTINGS), "bf16", state, async_io=True)


def test_parameters_in_fp32_are_refused() -> None:
    settings = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}
    with pytest.raises(InputError, match="half precision only"):
        require_disk_support(settings, "fp32", None, async_io=True)


def test_without_libaio_it_is_refused() -> None:
    with pytest.raises(InputError, match="needs libaio"):
        require_disk_support(read_json(SETTINGS), "bf16", None, async_io=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "parameters"), [("fp32", False), ("bf16", False), ("bf16", True)]
)
def test_it_trains_as_in_memory(dtype: str, parameters: bool, run: Path, tmp_path: Path) -> None:
    prepare_environment()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("DeepSpeed's async_io can't be built without libaio")
    large = tmp_path / "large"
    shutil.copytree(run, large)
    config = large / "config.yaml"
    config.write_text(re.sub(r"\brank: \d+", f"rank: {RANK}", config.read_text()))
    settings = read_json(SETTINGS)
    if parameters:
        offload = {"device": "nvme", "buffer_count": 200, "buffer_size": 10**7}
        settings["zero_optimization"] |= {
            "offload_param": offload,
            "stage3_param_persistence_threshold": 0,
        }
    path = tmp_path / "nvme.json"
    path.write_text(json.dumps(settings))
    task = dataclasses.replace(Task(large, lora=True), dtype=dtype).training(max_steps=3)
    cases = {
        "memory": task.using(zero=3),
        "disk": task.using(zero=3, ds_config=str(path), nvme_folder=str(tmp_path / "disk")),
    }
    results = run_ranks(train_all, 2, cases, tmp_path / "out", timeout=600)[0]
    memory, disk = results["memory"], results["disk"]
    assert isinstance(memory, Trained), memory
    assert isinstance(disk, Trained), disk
    assert list((tmp_path / "disk").rglob("exp_avg-*.swp"))
    assert disk.losses == memory.losses
    assert worst_moment(disk, memory) == 0.0
    assert whole_change(disk, memory) == 0.0
