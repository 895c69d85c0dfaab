"""The one file that knows DeepSpeed.

What is arranged here, and why:

- The caller owns accumulation: a step has any number of micro-batches, and the loss is a mean over
  the supervised tokens of the global batch. DeepSpeed divides by the number of ranks, so the loss
  is multiplied by it; its own division by accumulation steps is set to one.
- Trainable weights have fp32 masters. ZeRO 0 in half precision takes a wrong first step (its
  wrapper steps once while it starts), so that combination is refused.
- Gradient clipping is always written: DeepSpeed's default is 1.0, not "off".
- The state that is saved is our own: full fp32 tensors and Adam moments by name. So a checkpoint
  can be read by any number of ranks and any ZeRO stage, and holds no pickle and no frozen weight.
- On a CPU nothing is compiled: the shared-memory communication kernel is declared incompatible and
  the optimizer is torch's AdamW.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mera_ds.batch import Batch
from mera_ds.config import REPOSITORY, Dtype, ExecutionConfig, PhaseConfig
from mera_ds.distributed import World
from mera_ds.errors import InputError, NumericError
from mera_ds.files import read_json
from mera_ds.model.mllm import MultimodalLM
from mera_ds.train import eightbit

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class EngineState:
    """What training resumes from; tensors are full, fp32, on the CPU, named as in their files."""

    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]
    """`<name>.exp_avg` and `<name>.exp_avg_sq`."""
    scalars: dict[str, float]
    """Adam's step count and the state of the loss scaler."""


class Engine:
    """A model under DeepSpeed, its optimizer, and their state."""

    def __init__(
        self,
        model: MultimodalLM,
        sets: Mapping[str, Mapping[str, nn.Parameter]],
        phase: PhaseConfig,
        execution: ExecutionConfig,
        dtype: Dtype,
        world: World,
    ) -> None:
        if execution.zero == 0 and dtype != "fp32":
            raise InputError(
                f"execution.zero=0 with backbone.dtype={dtype} would take a wrong first step; "
                "use execution.zero=1, which costs nothing on one process"
            )
        self._world = world
        self._zero = execution.zero
        self._dtype = dtype
        self._eight_bit = phase.optimizer == "adamw8bit"
        self._named = {
            f"{group}/{name}": parameter
            for group, entry in sets.items()
            for name, parameter in entry.items()
        }
        exact = {name: entry.detach().float().cpu() for name, entry in self._named.items()}
        self._engine = _initialize(model, sets, phase, execution, dtype)
        self._create_moments()
        if dtype != "fp32":
            # DeepSpeed casts the model first and takes its masters from the rounded weights.
            for name, parameter in self._named.items():
                self._set_full(parameter, None, exact[name])
        if dtype == "fp16":
            # At the lowest scale a skipped step is counted as not finite instead.
            self._engine.optimizer.loss_scaler.raise_error_at_min_scale = False

    def _create_moments(self) -> None:
        """Give Adam its state before the first step, and link it to the parameters.

        DeepSpeed links it in the first step of the first parameter group, when the others have
        none yet, so the moments of all later groups could never be read.
        """
        if self._eight_bit:
            eightbit.create_moments(self._optimizer, self._masters())
            return
        for master in self._masters():
            self._optimizer.state[master] = {
                "step": torch.tensor(0.0),
                **{key: torch.zeros_like(master, dtype=torch.float32) for key in MOMENTS},
            }
        self._link_moments()

    def _link_moments(self) -> None:
        if self._zero in (1, 2):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    @contextmanager
    def _full_moments(self, *, changing: bool = False) -> Iterator[None]:
        """While the block reads or changes moments of 8 bit, let them be fp32 tensors as usual."""
        states = [self._optimizer.state[entry] for entry in self._masters()]
        if self._eight_bit:
            for entry in states:
                entry.update(eightbit.unpack(entry))
            self._link_moments()
        yield
        if self._eight_bit:
            for entry in states:
                moments = {key: entry.pop(key) for key in MOMENTS}
                if changing:
                    eightbit.pack(entry, moments)
            self._link_moments()

    def backward(self, batch: Batch, global_tokens: int, last: bool) -> Tensor:
        """Add one micro-batch's gradient; return its share of the global mean loss, in fp64.

        The device is not waited for.

        Args:
            batch: the micro-batch.
            global_tokens: supervised tokens of the whole global batch, over all ranks.
            last: whether this is the step's last micro-batch.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        loss = self._engine(batch) / max(1, global_tokens)
        self._engine.backward(loss * self._world.size)
        if not last:
            self._engine.step()
        return loss.detach().double()

    def step(self, learning_rates: Mapping[str, float]) -> bool:
        """Take the optimizer step; return False if it was skipped because of non-finite gradients.

        Args:
            learning_rates: per trainable set.

        Raises:
            NumericError: if non-finite values reached the weights; the last checkpoint is good.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rates[group["name"]]
        if self._zero == 0 and not self._gradients_are_finite():
            self._engine.optimizer.zero_grad()
            self._engine.zero_grad()
            return False
        self._engine.step()
        if bool(getattr(self._engine.optimizer, "overflow", False)):
            return False
        if self._zero == 3 and not all(bool(torch.isfinite(p).all()) for p in self._masters()):
            raise NumericError(
                "a non-finite gradient reached the weights; run the same command again to continue "
                "from the last checkpoint, with a lower learning rate if it comes back"
            )
        return True

    def only_lowered_scale(self, loss: float) -> bool:
        """Return whether a skipped step was fp16's search for a loss scale, which is no fault.

        Args:
            loss: the step's; if it is finite, the gradient overflowed only because it was scaled.
        """
        if self._dtype != "fp16" or not math.isfinite(loss):
            return False
        scaler = self._engine.optimizer.loss_scaler
        return bool(scaler.cur_scale > scaler.min_scale)

    def _gradients_are_finite(self) -> bool:
        gradients = (entry.grad for entry in self._named.values() if entry.grad is not None)
        return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer inside DeepSpeed's wrapper, if there is one."""
        optimizer = self._engine.optimizer
        return optimizer if self._zero == 0 else optimizer.optimizer

    def _masters(self) -> list[Tensor]:
        """The fp32 tensors that the torch optimizer updates on this rank."""
        optimizer = self._engine.optimizer
        if self._zero == 0:
            return list(self._named.values())
        if self._zero == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        return list(optimizer.single_partition_of_fp32_groups)

    def state(self) -> EngineState:
        """Return the full state; every rank must call it."""
        parameters, moments = {}, {}
        with self._full_moments():
            for name, parameter in self._named.items():
                parameters[name] = self._full(parameter, None)
                for key in MOMENTS:
                    moments[f"{name}.{key}"] = self._full(parameter, key)
        steps = [float(self._optimizer.state[entry]["step"]) for entry in self._masters()]
        return EngineState(parameters, moments, {"adam_step": steps[0], **self._scaler_state()})

    def parameters(self) -> dict[str, Tensor]:
        """Return the full fp32 trainable tensors; every rank must call it."""
        return {name: self._full(entry, None) for name, entry in self._named.items()}

    def mean_squared_gradients(self, group: str) -> dict[str, Tensor]:
        """Return Adam's second moments of one set, without their bias to 0; all ranks call it."""
        steps = float(self._optimizer.state[self._masters()[0]]["step"])
        bias = 1 - self._optimizer.param_groups[0]["betas"][1] ** max(1.0, steps)
        with self._full_moments():
            return {
                name.removeprefix(f"{group}/"): self._full(entry, "exp_avg_sq") / bias
                for name, entry in self._named.items()
                if name.startswith(f"{group}/")
            }

    def _full(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._zero == 0:
            value = parameter if key is None else self._optimizer.state[parameter][key]
        elif key is None:
            value = safe_get_full_fp32_param(parameter)
        else:
            value = safe_get_full_optimizer_state(parameter, key)
        return value.detach().to("cpu", torch.float32, copy=True)

    def load_state(self, state: EngineState) -> None:
        """Take over a state, on whatever number of ranks it was saved."""
        steps = state.scalars["adam_step"]
        for master in self._masters():
            step = int(steps) if self._eight_bit else torch.tensor(steps)
            self._optimizer.state[master]["step"] = step
        with self._full_moments(changing=True):
            for name, parameter in self._named.items():
                self._set_full(parameter, None, state.parameters[name])
                for key in MOMENTS:
                    self._set_full(parameter, key, state.moments[f"{name}.{key}"])
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        for name, value in state.scalars.items():
            if name.startswith("scaler_"):
                setattr(scaler, name.removeprefix("scaler_"), type(value)(value))

    def _set_full(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        """Set one of Adam's moments, or (`key` None) a master and the copy that computes."""
        from deepspeed import utils

        value = value.to(parameter.device)
        if self._zero == 0:
            target = parameter if key is None else self._optimizer.state[parameter][key]
            target.data.copy_(value)
        elif self._zero == 3:
            # The "full" setter of DeepSpeed fails where the size does not divide by the ranks.
            part = self._partition_of(value, parameter)
            if key is None:
                utils.safe_set_local_fp32_param(parameter, part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, key)
        elif key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)
        if key is None and self._zero > 0:
            self._set_working_copy(parameter, value)

    def _set_working_copy(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set what the model computes with; DeepSpeed's setters leave it as it was."""
        import deepspeed

        sharded = self._zero == 3
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded):
            parameter.data.copy_(value)

    def _partition_of(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """This rank's zero-padded part of a full tensor, as ZeRO-3 cuts it."""
        size = math.ceil(value.numel() / self._world.size)
        padded = torch.zeros(size * self._world.size, dtype=value.dtype, device=value.device)
        padded[: value.numel()] = value.flatten()
        return padded[size * self._world.rank : size * (self._world.rank + 1)]

    def _scaler_state(self) -> dict[str, float]:
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        if self._dtype != "fp16" or scaler is None:
            return {}
        return {f"scaler_{name}": getattr(scaler, name) for name in names if hasattr(scaler, name)}

    def close(self) -> None:
        """Release what DeepSpeed holds, so that another engine can follow in this process."""
        self._engine.destroy()


def _initialize(
    model: MultimodalLM,
    sets: Mapping[str, Mapping[str, nn.Parameter]],
    phase: PhaseConfig,
    execution: ExecutionConfig,
    dtype: Dtype,
) -> Any:
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
