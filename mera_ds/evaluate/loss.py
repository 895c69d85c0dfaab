"""The loss of a model on some texts, without generating."""

from collections.abc import Iterable, Sequence

from mera_ds.batch import Batch
from mera_ds.data.dataset import UnitReader, UnitRef
from mera_ds.model.mllm import MultimodalLM


def read_batches(reader: UnitReader, units: Iterable[UnitRef], size: int) -> list[Batch]:
    """Read units of one modality into batches of `size` samples, the last maybe smaller."""
    ready = [reader.read(unit) for unit in units]
    parts = [tuple(ready[start : start + size]) for start in range(0, len(ready), size)]
    return [Batch(part, (True,) * len(part)) for part in parts]


def mean_loss(model: MultimodalLM, batches: Sequence[Batch]) -> float:
    """Return the mean loss per supervised token."""
    total = sum(float(model(batch)) for batch in batches)
    return total / sum(batch.supervised_tokens for batch in batches)
