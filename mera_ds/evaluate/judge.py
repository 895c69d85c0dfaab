"""Judging free-form answers: the interface, a judge that works offline, and accuracy.

A judgement that could not be made is missing. It never counts as "no".
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mera_ds.errors import DataError, InputError

MISSING_ALLOWED = 0.005
"""Largest share of missing judgements with which an accuracy is given as final."""


@dataclass(frozen=True)
class JudgeItem:
    """One predicted answer to be judged."""

    id: str
    question: str
    answers: tuple[str, ...]
    """All answers accepted as right."""
    prediction: str

    def __post_init__(self) -> None:
        if not any(answer.strip() for answer in self.answers):
            raise DataError(f"{self.id!r} has no accepted answer; remove it from the test set")


@dataclass(frozen=True)
class Judgement:
    """What a judge says of one item."""

    verdict: Literal["yes", "no", "invalid", "error"]
    """`invalid`: the judge's replies were not understood; `error`: there was no reply."""
    score: int | None
    """0 to 5, where the judge gives one."""
    detail: str
    """The judge's reply, the accepted answer that matched, or what went wrong."""


class Judge(Protocol):
    """Anything that judges items; the verdicts come in the order of the items."""

    @property
    def name(self) -> str:
        """The name that stands in results."""

    def judge(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        """Judge all items."""


@dataclass(frozen=True)
class Accuracy:
    """Share of "yes" among the items that could be judged."""

    score: float | None
    """0 to 1; None if nothing could be judged."""
    count: int
    """Items judged "yes" or "no"."""
    missing: int
    """Items without a verdict."""
    withheld: bool
    """More than `MISSING_ALLOWED` of the items are missing: the score is not final."""


def accuracy(judgements: Sequence[Judgement]) -> Accuracy:
    """Return the accuracy over the judged items, as the paper's judge script defines it.

    Raises:
        InputError: there is nothing to average.
    """
    if not judgements:
        raise InputError("there are no judgements to compute an accuracy of")
    verdicts = [judgement.verdict for judgement in judgements]
    right, count = verdicts.count("yes"), verdicts.count("yes") + verdicts.count("no")
    missing = len(verdicts) - count
    return Accuracy(
        score=right / count if count else None,
        count=count,
        missing=missing,
        withheld=missing > MISSING_ALLOWED * len(verdicts),
    )


@dataclass(frozen=True)
class OfflineJudge:
    """Says "yes" if the normalised prediction equals, or contains, an accepted answer.

    `offline-containment` looks for the answer's words in a row, so it also says "yes" to a
    prediction that names every answer there is.
    """

    name: Literal["offline-exact", "offline-containment"] = "offline-exact"

    def judge(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        """Judge all items."""
        return [self._judge(item) for item in items]

    def _judge(self, item: JudgeItem) -> Judgement:
        prediction = normalise(item.prediction)
        for answer in item.answers:
            wanted = normalise(answer)
            contained = self.name == "offline-containment" and f" {wanted} " in f" {prediction} "
            if wanted and (wanted == prediction or contained):
                return Judgement("yes", None, f"matches {answer!r}")
        return Judgement("no", None, "matches no accepted answer")


_ARTICLES = {"a", "an", "the"}
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_NUMBERS = {
    **{word: value for value, word in enumerate(_UNITS)},
    **{word: 10 * value for value, word in enumerate(_TENS, start=2)},
    "hundred": 100,
}


def normalise(text: str) -> str:
    """Return the text in lower case, without articles and punctuation, numbers (to 999) as digits.

    What consists of articles or punctuation only is kept: it may be an answer ("A").
    """
    text = unicodedata.normalize("NFKC", text).casefold().strip()
    plain = re.sub(r"(?<=\d),(?=\d{3})|(?<!\d)\.|\.(?!\d)|['’]", "", text)
    plain = re.sub(r"[^\w.]|_", " ", plain)
    words = plain.split()
    return (
        " ".join(_with_digits([word for word in words if word not in _ARTICLES] or words)) or text
    )


def _with_digits(words: Sequence[str]) -> list[str]:
    """Write number words as digits: `twenty one` becomes `21`, `two hundred five` `205`."""
    result: list[str] = []
    number: int | None = None
    for word in words:
        value = _NUMBERS.get(word)
        joined = None if number is None or value is None else _joined(number, value)
        if joined is None:
            result.append(word if value is None else str(value))
            number = value
        else:
            result[-1] = str(joined)
            number = joined
    return result


def _joined(number: int, value: int) -> int | None:
    """Return the number that two number words in a row stand for, None if they are two."""
    if value == 100:
        return 100 * number if 0 < number < 10 else None
    after_tens = number % 100 >= 20 and number % 10 == 0 and 0 < value < 10
    after_hundreds = number >= 100 and number % 100 == 0 and value > 0
    return number + value if after_tens or after_hundreds else None
