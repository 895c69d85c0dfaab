"""How far two judges agree on the same predictions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mera_ds.evaluate.judge import Judgement

Answer = Literal["yes", "no", "missing"]
ANSWERS: tuple[Answer, ...] = ("yes", "no", "missing")


@dataclass(frozen=True)
class Agreement:
    """What two judges said of the same items."""

    table: Mapping[tuple[Answer, Answer], int]
    """Items by what the first and the second judge said."""

    @property
    def judged(self) -> int:
        """Return how many items both judged."""
        return sum(count for pair, count in self.table.items() if "missing" not in pair)

    @property
    def agreement(self) -> float | None:
        """Return the share of the items judged by both on which they agree."""
        both = self.judged
        return (self.table["yes", "yes"] + self.table["no", "no"]) / both if both else None

    @property
    def kappa(self) -> float | None:
        """Return Cohen's kappa: (p_o - p_e) / (1 - p_e), where p_e is agreement by chance.

        None if nothing was judged by both, or both always said the same one thing (p_e = 1).
        """
        observed = self.agreement
        if observed is None:
            return None
        first, second = (self._share_of_yes(place) for place in (0, 1))
        chance = first * second + (1 - first) * (1 - second)
        return None if chance == 1 else (observed - chance) / (1 - chance)

    def accuracy(self, place: int) -> float | None:
        """Return the accuracy by the first (0) or second (1) judge, over what both judged."""
        return self._share_of_yes(place) if self.judged else None

    def _share_of_yes(self, place: int) -> float:
        pairs = [pair for pair in self.table if "missing" not in pair and pair[place] == "yes"]
        return sum(self.table[pair] for pair in pairs) / self.judged


def compare_judges(first: Sequence[Judgement], second: Sequence[Judgement]) -> Agreement:
    """Compare two judges' verdicts on the same items; what could not be judged is missing."""
    pairs = Counter((_answer(a), _answer(b)) for a, b in zip(first, second, strict=True))
    return Agreement({(one, other): pairs[one, other] for one in ANSWERS for other in ANSWERS})


def _answer(judgement: Judgement) -> Answer:
    return judgement.verdict if judgement.verdict in ("yes", "no") else "missing"


def in_total(parts: Sequence[Agreement]) -> Agreement:
    """Return the agreement over all parts together."""
    pairs = [(one, other) for one in ANSWERS for other in ANSWERS]
    return Agreement({pair: sum(part.table[pair] for part in parts) for pair in pairs})
