"""The engine: the one place, with `setup`, that knows DeepSpeed.

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
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mera_ds.batch import Batch
from mera_ds.config import Dtype, ExecutionConfig, PhaseConfig
from mera_ds.distributed import World
from mera_ds.errors import InputError, NumericError
from mera_ds.model.mllm import MultimodalLM, Positions
from mera_ds.plan import BACKBONE
from mera_ds.train import eightbit
from mera_ds.train.penalty import IMPORTANCE, HeldFactors, add_penalty_gradient, kept_as
from mera_ds.train.setup import initialize
from mera_ds.train.shares import SharedTensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class EngineState:
    """What training resumes from; tensors are full, fp32, on the CPU, named as in their files."""

    parameters: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
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
        held: HeldFactors | None = None,
    ) -> None:
        if execution.zero == 0 and dtype != "fp32":
            raise InputError(
                f"execution.zero=0 with backbone.dtype={dtype} would take a wrong first step; "
                "use execution.zero=1, which costs nothing on one process"
            )
        self._model = model
        if held is not None and phase.optimizer != "adamw":
            raise InputError(
                f"tune.optimizer={phase.optimizer} has no place beside its moments for the "
                "importance that method=ewc holds the weights by; use tune.optimizer=adamw"
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
        self._shapes = {name: tuple(entry.shape) for name, entry in self._named.items()}
        exact = {
            name: entry.detach().cpu()
            for name, entry in self._named.items()
            if dtype != "fp32" and entry.dtype == torch.float32
        }
        self._engine = initialize(model, sets, phase, execution, dtype, held=held is not None)
        self._held = held
        self._groups = list(sets)
        self._create_moments()
        # DeepSpeed casts the model first and takes its masters from the rounded weights.
        for name, value in exact.items():
            self._set_full(self._named[name], None, value)
        if dtype == "fp16":
            # At the lowest scale a skipped step is counted as not finite instead.
            self._engine.optimizer.loss_scaler.raise_error_at_min_scale = False
        if held is not None:
            self._hold(held)

    def _hold(self, held: HeldFactors) -> None:
        """Lay F and θ* beside Adam's moments, and add the penalty's gradient before its steps."""
        for key in kept_as(self._dtype):
            for name, value in held.values(key).items():
                self._set_full(self._named[f"{held.group}/{name}"], key, value)

        def add(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                for master in group["params"]:
                    state = optimizer.state[master]
                    if IMPORTANCE in state:
                        add_penalty_gradient(master, state, held.strength)

        self._optimizer.register_step_pre_hook(add)

    def _create_moments(self) -> None:
        """Give Adam its state before the first step, and link it to the parameters.

        DeepSpeed links it in the first step of the first parameter group, when the others have
        none yet, so the moments of all later groups could never be read.
        """
        if self._eight_bit:
            eightbit.create_moments(self._optimizer, self._masters())
            return
        for number, master in enumerate(self._masters()):
            with self._in_memory(number):
                zeros = {key: torch.zeros_like(master, dtype=torch.float32) for key in MOMENTS}
                self._optimizer.state[master] = {"step": torch.tensor(0.0), **zeros}
        if self._held is not None:
            for master in self._masters_of(self._held.group):
                for key, kept in kept_as(self._dtype).items():
                    self._optimizer.state[master][key] = torch.zeros_like(master, dtype=kept)
        self._link_moments()

    @contextmanager
    def _in_memory(self, number: int) -> Iterator[None]:
        """While the block works, hold a master in memory that is offloaded to a disk."""
        optimizer = self._engine.optimizer
        on_disk = self._zero == 3 and optimizer._swappable_optimizer_subgroup(number)
        if on_disk:
            optimizer._optimizer_states_and_gradient_swap_in(number)
        try:
            yield
        finally:
            if on_disk:
                optimizer._optimizer_states_and_gradient_swap_out(number)

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

    def take_positions(self) -> Positions:
        """Return how many positions the backbone has computed since the last call."""
        return self._model.take_positions()

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

    def _masters_of(self, group: str) -> list[Tensor]:
        """Those that hold (a part of) the parameters of one set."""
        optimizer, masters = self._engine.optimizer, self._masters()
        if self._zero == 0:
            names = list(self._named)
            return [
                m for name, m in zip(names, masters, strict=True) if name.startswith(f"{group}/")
            ]
        number = self._groups.index(group)
        if self._zero == 3:
            of = optimizer.sub_group_to_group_id
            return [master for place, master in enumerate(masters) if of[place] == number]
        return [masters[number]]

    def state(self) -> EngineState:
        """Return the full state; every rank must call it."""
        parameters, moments = {}, {}
        with self._full_moments():
            for name, parameter in self._named.items():
                parameters[name] = self._full(parameter, None)
                for key in MOMENTS:
                    moments[f"{name}.{key}"] = self._full(parameter, key)
        return EngineState(parameters, moments, self.scalars())

    def scalars(self) -> dict[str, float]:
        """Return Adam's step count and the state of the loss scaler."""
        steps = [float(self._optimizer.state[entry]["step"]) for entry in self._masters()]
        return {"adam_step": steps[0], **self._scaler_state()}

    def parameters(self, without: Collection[str] = ()) -> dict[str, Tensor]:
        """Return the full fp32 trainable tensors of all sets but some; every rank must call it."""
        return {
            name: self._full(entry, None)
            for name, entry in self._named.items()
            if name.partition("/")[0] not in without
        }

    @property
    def is_large(self) -> bool:
        """Whether the whole backbone trains, so that no rank may hold the full state."""
        return any(name.startswith(f"{BACKBONE}/") for name in self._named)

    def shared_backbone(self) -> list[SharedTensor]:
        """Return the fp32 weights of the trained backbone under their names in an HF checkpoint."""
        prefix = f"{BACKBONE}/"
        return [
            self._shared(name, None, name.removeprefix(prefix))
            for name in self._named
            if name.startswith(prefix)
        ]

    @contextmanager
    def shared_state(self) -> Iterator[list[SharedTensor]]:
        """Give the block the tensors of `state`, to be gathered one by one."""
        entries = [(name, key) for name in self._named for key in (None, *MOMENTS)]
        with self._full_moments():
            yield [
                self._shared(name, key, name if key is None else f"{name}.{key}")
                for name, key in entries
            ]

    def _shared(self, name: str, key: str | None, title: str) -> SharedTensor:
        parameter = self._named[name]
        return SharedTensor(title, self._shapes[name], lambda: self._gathered(parameter, key))

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
        return self._gathered(parameter, key).float().cpu().clone()

    def _gathered(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._zero == 0:
            value = parameter if key is None else self._optimizer.state[parameter][key]
        elif key is None:
            value = safe_get_full_fp32_param(parameter)
        else:
            value = safe_get_full_optimizer_state(parameter, key)
        return value.detach()

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
