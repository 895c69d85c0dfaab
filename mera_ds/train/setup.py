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


def initialize(
    model: MultimodalLM,
    sets: Mapping[str, Mapping[str, nn.Parameter]],
    phase: PhaseConfig,
    execution: ExecutionConfig,
    dtype: Dtype,
) -> Any:
    """Return a model's DeepSpeed engine, with an optimizer whose groups are named as the sets.

    Raises:
        InputError: if this machine can't train so.
    """
    prepare_environment()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if dtype == "fp16" and not get_accelerator().is_fp16_supported():
        raise InputError(
            "backbone.dtype=fp16 can't be trained on this machine's processor; use bf16 or fp32"
        )
    # The rates are set at every step.
    groups = [{"params": list(entry.values()), "name": name} for name, entry in sets.items()]
    kind = eightbit.adamw_8bit if phase.optimizer == "adamw8bit" else torch.optim.AdamW
    optimizer = kind(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=phase.weight_decay)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=engine_config(execution, dtype, phase.max_grad_norm),
        dist_init_required=False,
    )
    return engine


def engine_config(execution: ExecutionConfig, dtype: Dtype, clip: float) -> dict[str, Any]:
    """Return DeepSpeed's configuration: the JSON file plus what only the run knows.

    Raises:
        InputError: if the file sets what the run's configuration decides.
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
    return {**settings, **ours}


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
