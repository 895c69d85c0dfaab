"""What a diagnosis is about and what it finds; see `mera_ds.evaluate.diagnose`. Without torch."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StageModel:
    """What a stage has left."""

    modality: str
    product: Path
    realigned: Path
    """Where the connectors of (b) are; `product`, unless it was realigned for the diagnosis."""


@dataclass(frozen=True)
class Finding:
    """One old modality after one stage."""

    stage: int
    learnt_at: int
    modality: str
    old_connector: float
    """(a), loss per token, or per cent lost of the scores."""
    newest_connector: float
    """(b)"""
    when_learnt: float
    """(c)"""
    weight_drift: tuple[float, ...]
    """Per block: ‖W_i − W_j‖ / ‖W_i‖ over its linear layers; empty: not known by deltas."""
    cosines: tuple[float, ...]
    """Per block: mean cosine of hidden states with those of (c)."""

    @property
    def misalignment(self) -> float:
        """What the newest connector wins: a − b."""
        return self.old_connector - self.newest_connector

    @property
    def forgetting(self) -> float:
        """What is lost all the same: b − c."""
        return self.newest_connector - self.when_learnt
