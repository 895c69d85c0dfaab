"""The diagonal of the Fisher information: by hand, sample by sample, and on two ranks."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mera_ds.batch import Batch, Sample
from mera_ds.distributed import World
from mera_ds.errors import NumericError
from mera_ds.plan import LORA
from mera_ds.train.importance import squared_gradients

from .problem import Task, build_mixture, build_trainee, whole


class Slope(nn.Module):
    """The loss of a sample is (number of its answer tokens) · x · w, with x its medium."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -1.0]))

    def forward(self, batch: Batch) -> Tensor:
        """Return the summed loss."""
        losses = [len(s.answer_ids) * (s.media @ self.w) for s in batch.samples]
        return torch.stack(losses).sum()


def sample(values: list[float], answer: int) -> Sample:
    return Sample(
        id="here/0#0",
        modality="image",
        prefix_ids=(),
        suffix_ids=(),
        answer_ids=tuple(range(answer)),
        media=torch.tensor(values),
        encoded=True,
    )


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_by_hand(scale: float) -> None:
    """Gradients (1, 2) and (3, -1) of the losses per token: 1 + 9 = 10, 4 + 1 = 5."""
    model = Slope()
    samples = [sample([1.0, 2.0], answer=5), sample([3.0, -1.0], answer=2)]
    found = squared_gradients(model, {"w": model.w}, samples, scale)  # type: ignore[arg-type]
    assert found["w"].tolist() == [10.0, 5.0]
    assert model.w.grad is None


def test_a_scale_that_is_too_large_is_halved() -> None:
    model = Slope()
    samples = [sample([1e37, 2.0], answer=1)]
    found = squared_gradients(model, {"w": model.w}, samples, 2.0**16)  # type: ignore[arg-type]
    assert found["w"][1].item() == 4.0
    with pytest.raises(NumericError, match="here/0#0: its gradient is not finite"):
        squared_gradients(model, {"w": model.w}, [sample([math.inf, 0.0], 1)])  # type: ignore[arg-type]


def test_a_real_model_sample_by_sample(run: Path) -> None:
    """The mean over samples of squares is not the square of the mean gradient."""
    task = Task(run, lora=True)
    part = build_mixture(task, World(rank=0, size=1, local_rank=0))["image"]
    samples = [part.reader.read(unit) for unit in part.units[:3]]
    model, sets = build_trainee(task)
    model.eval()
    with torch.no_grad():
        for parameter in sets[LORA].values():
            parameter.normal_(std=0.05)
    found = squared_gradients(model, sets[LORA], samples)
    expected = {name: torch.zeros_like(parameter) for name, parameter in sets[LORA].items()}
    for entry in samples:
        model.zero_grad()
        batch = whole([entry])
        (model(batch) / batch.supervised_tokens).backward()
        for name, parameter in sets[LORA].items():
            assert parameter.grad is not None
            expected[name] += parameter.grad**2
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
        assert bool(value.any())
