"""Points of a merge sweep: what earlier modalities lose against what the newest gains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One way of merging, tried."""

    name: str
    arguments: str | None
    """What to write behind `mera-ds lineage reweight RUN …`; None: the model as it stands."""
    losses: Mapping[str, float]
    """Mean loss per supervised token, by modality in the order of the stages."""

    @property
    def old(self) -> float:
        """Mean over all modalities but the newest."""
        *older, _ = self.losses.values()
        return sum(older) / len(older)

    @property
    def new(self) -> float:
        """Loss of the newest modality."""
        return list(self.losses.values())[-1]

    @property
    def mean(self) -> float:
        """Mean over all modalities, each counting the same."""
        return sum(self.losses.values()) / len(self.losses)


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one beats in both, by falling loss of the newest."""
    best = [
        point
        for point in points
        if not any(
            other.old <= point.old
            and other.new <= point.new
            and (other.old, other.new) != (point.old, point.new)
            for other in points
        )
    ]
    return sorted(best, key=lambda point: (point.old, -point.new))


def choose(points: Sequence[Point]) -> Point:
    """Return the point with the smallest mean loss over all modalities; it is on the front."""
    return min(points, key=lambda point: point.mean)
