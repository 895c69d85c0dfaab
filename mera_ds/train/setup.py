"""What DeepSpeed is told: the environment, its configuration, the optimizer. See `engine`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mera_ds.config import REPOSITORY, Dtype, ExecutionConfig, PhaseConfig
from mera_ds.errors import InputError
from mera_ds.files import read_json
from mera_ds.model.mllm import MultimodalLM
from mera_ds.train import eightbit
from mera_ds.train.offload import on_disk, require_disk_support, with_folder


def initialize(
    model: MultimodalLM,
    sets: Mapping[str, Mapping[str, nn.Parameter]],
    phase: PhaseConfig,
    execution: ExecutionConfig,
    dtype: Dtype,
    *,
    held: bool = False,
) -> Any:
    """Return a model's DeepSpeed engine, with an optimizer whose groups are named as the sets.

    Args:
        model: what trains.
        sets: its trainable sets, by name.
        phase: hyperparameters.
        execution: how it is executed.
        dtype: of the backbone.
        held: whether EWC's anchor and importance will lie beside Adam's moments.

    Raises:
        InputError: if this machine can't train so.
    """
    prepare_environment()
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if dtype == "fp16" and not get_accelerator().is_fp16_supported():
        raise InputError(
            "backbone.dtype=fp16 can't be trained on this machine's processor; use bf16 or fp32"
        )
    # The rates are set at every step.
    groups = [{"params": list(entry.values()), "name": name} for name, entry in sets.items()]
    eight_bit = phase.optimizer == "adamw8bit"
    kind = eightbit.adamw_8bit if eight_bit else torch.optim.AdamW
    optimizer = kind(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=phase.weight_decay)
    config = engine_config(execution, dtype, phase.max_grad_norm)
    other_state = "tune.optimizer=adamw8bit" if eight_bit else "method=ewc" if held else None
    if on_disk(config):
        require_disk_support(config, dtype, other_state, AsyncIOBuilder().is_compatible())
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=config,
        dist_init_required=False,
    )
    return engine


def engine_config(execution: ExecutionConfig, dtype: Dtype, clip: float) -> dict[str, Any]:
    """Return DeepSpeed's configuration: the JSON file plus what only the run knows.

    Raises:
        InputError: if the file sets what the run's configuration decides, or is for another ZeRO
            stage, or `execution.nvme_folder` doesn't fit it.
    """
    path = Path(execution.ds_config or REPOSITORY / "ds_configs" / f"zero{execution.zero}.json")
    settings = read_json(path)
    ours = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "fp16": {"enabled": dtype == "fp16", "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": dtype == "bf16"},
    }
    conflicts = sorted(ours.keys() & settings.keys())
    if conflicts:
        raise InputError(f"{path} sets '{conflicts[0]}', which the run's configuration decides")
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage != execution.zero:
        raise InputError(f"{path} is for ZeRO {stage}, but execution.zero is {execution.zero}")
    return {**with_folder(settings, execution.nvme_folder, path), **ours}


def prepare_environment() -> None:
    """Keep DeepSpeed from compiling on a CPU and from printing on import."""
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    # Given before DeepSpeed asks: finding it out would run a compiler.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
