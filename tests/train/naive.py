"""Plain DeepSpeed, used in the ways that one would try first.

Two connectors of which a micro-batch needs one: each form of calling them is right without
DeepSpeed, and what it makes of them is the reason for how `MultimodalLM.forward` calls its own. And
Adam's first step in half precision, the reason why the engine refuses ZeRO 0 there.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mera_ds.distributed import process_group
from mera_ds.train.setup import prepare_environment

from .problem import prepare

WIDTH = 4
RATE = 0.1
Micro = tuple[str, ...]
"""Which connector each rank uses in a micro-step."""


@dataclass(frozen=True)
class Trial:
    """A form of calling the connectors, and who needs which when."""

    form: str
    steps: tuple[tuple[Micro, ...], ...]
    """Micro-steps of each optimizer step."""
    width_b: int = WIDTH
    """Input width of the second connector."""


class TwoConnectors(nn.Module):
    """Connectors `a` and `b`, and a loss that needs one of them."""

    def __init__(self, form: str, width_b: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(WIDTH, 3)
        self.b = nn.Linear(width_b, 3)
        self._call: Callable[[str, Tensor], Tensor] = FORMS[form].__get__(self)

    def forward(self, needed: str, values: Tensor) -> Tensor:
        """Return the loss of one micro-batch."""
        return self._call(needed, values)

    def used(self, name: str, values: Tensor) -> Tensor:
        """The loss through one connector."""
        connector = self.get_submodule(name)
        return connector(values[:, : connector.in_features]).square().sum()


def own_only(model: TwoConnectors, needed: str, values: Tensor) -> Tensor:
    """Call the connector that is needed, and no other."""
    return model.used(needed, values)


def own_first(model: TwoConnectors, needed: str, values: Tensor) -> Tensor:
    """Call the one that is needed, then the other with weight 0."""
    other = "b" if needed == "a" else "a"
    return model.used(needed, values) + 0.0 * model.used(other, values)


def zero_sum(model: TwoConnectors, needed: str, values: Tensor) -> Tensor:
    """Call the one that is needed, and add 0 times the sum of all parameters."""
    return model.used(needed, values) + 0.0 * sum(p.sum() for p in model.parameters())


def fixed_order(model: TwoConnectors, needed: str, values: Tensor) -> Tensor:
    """Call both, in one order on all ranks, with weight 1 or 0."""
    return sum(
        (float(name == needed) * model.used(name, values) for name in ("a", "b")), torch.zeros(())
    )


FORMS: dict[str, Callable[[TwoConnectors, str, Tensor], Tensor]] = {
    "own only": own_only,
    "own first": own_first,
    "zero sum": zero_sum,
    "fixed order": fixed_order,
}


def largest_error(trial: Trial, zero: int) -> float:
    """Train under DeepSpeed on these ranks; return the largest error of a parameter."""
    world = prepare()
    with process_group(world, timeout_seconds=10):
        model = TwoConnectors(trial.form, trial.width_b)
        parameters = list(model.parameters())
        engine = _initialize(model, torch.optim.SGD(parameters, lr=RATE), zero)
        for number, step in enumerate(trial.steps):
            for place, micro in enumerate(step):
                engine.set_gradient_accumulation_boundary(place == len(step) - 1)
                values = _values(number, place, world.rank, trial)
                engine.backward(engine(micro[world.rank], values))
                engine.step()
        found = [_full(parameter, zero) for parameter in parameters]
        expected = _exact(trial, world.size)
        return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def first_adam_step(zero: int) -> float:
    """Return the size of Adam's first step in bf16, in units of the learning rate; it must be 1."""
    world = prepare()
    with process_group(world, timeout_seconds=10):
        model = nn.Linear(WIDTH, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
        engine = _initialize(model, optimizer, zero, bf16={"enabled": True})
        engine.backward(engine(torch.ones(1, WIDTH, dtype=torch.bfloat16)).sum())
        engine.step()
        return float(model.weight.detach().abs().mean()) / RATE


def _initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, zero: int, **settings: Any
) -> Any:
    prepare_environment()
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": zero},
        **settings,
    }
    engine, _, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def _full(parameter: nn.Parameter, zero: int) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    return parameter.detach() if zero == 0 else safe_get_full_fp32_param(parameter)


def _values(step: int, place: int, rank: int, trial: Trial) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * place + rank)
    return torch.randn(2, max(WIDTH, trial.width_b), generator=generator)


def _exact(trial: Trial, ranks: int) -> Iterable[Tensor]:
    """The same in one process: the mean over the ranks, the sum over the micro-steps."""
    model = TwoConnectors(trial.form, trial.width_b)
    for number, step in enumerate(trial.steps):
        losses = [
            model(micro[rank], _values(number, place, rank, trial)) / ranks
            for place, micro in enumerate(step)
            for rank in range(ranks)
        ]
        _descend(list(model.parameters()), losses)
    return [parameter.detach() for parameter in model.parameters()]


def _descend(parameters: Sequence[nn.Parameter], losses: Sequence[Tensor]) -> None:
    gradients = torch.autograd.grad(
        sum(losses, torch.zeros(())), parameters, allow_unused=True, materialize_grads=True
    )
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= RATE * gradient
