"""What all four modalities of the pocket set share: items, head words, and the split by concept."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from mera_ds.recipes.pocket.sources import Package
from mera_ds.shards.format import Text
from mera_ds.shards.writer import RawSample

MAX_CAPTION_WORDS = 6
MAX_TEST_SHARE = 0.34
"""No more than this part of a class's items goes to the test split."""


class Labelled(Protocol):
    """Anything that is split: it has a concept, which stays on one side, and a class."""

    @property
    def concept(self) -> str: ...

    @property
    def answer(self) -> str: ...


Candidate = TypeVar("Candidate", bound=Labelled)


@dataclass(frozen=True)
class Item:
    """One medium with its captions (the first one is for training) and the class it is in."""

    key: str
    extension: str
    media: bytes
    concept: str
    source: str
    answer: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """One modality of the set, ready to be written."""

    modality: str
    licence: str
    question: str
    answers: tuple[str, ...]
    train: tuple[Item, ...]
    test: tuple[Item, ...]
    method: str
    """One sentence on how the media were made from the source."""
    packages: tuple[Package, ...]
    credits: tuple[str, ...] = ()
    """Lines for the NOTICE that name works and their authors one by one."""


def raw_sample(item: Item, question: str, captions: int) -> RawSample:
    """Return the sample to write: at most `captions` captions, then the question."""
    texts = [
        Text(f"c{number}", "caption", "", (caption,))
        for number, caption in enumerate(dict.fromkeys(item.captions[:captions]))
    ]
    texts.append(Text("q0", "qa", question, (item.answer,)))
    return RawSample(
        key=item.key,
        extension=item.extension,
        media=item.media,
        concept=item.concept,
        source=item.source,
        texts=tuple(texts),
    )


def captions_of(name: str, phrase: str) -> tuple[str, ...]:
    """Return "name, phrase" (or the name alone if that is too long), the name, and the phrase."""
    full = f"{name}, {phrase}"
    return (full if len(full.split()) <= MAX_CAPTION_WORDS else name, name, phrase)


def head_word(label: str, ignored: frozenset[str] = frozenset()) -> str:
    """Return the word that says what a label is about: "guide dog" -> "dog", "pear tree" -> "tree".

    It is the last word in front of "with", "of", "in", "on" or "and", in the singular, without
    the `ignored` words (colours, directions) that tell variants of one concept apart.
    """
    words = re.findall(r"[a-z]+", label.lower())
    kept = [word for word in words if word not in ignored] or words
    for position, word in enumerate(kept):
        if word in ("with", "of", "in", "on", "and", "without") and position:
            kept = kept[:position]
            break
    last = kept[-1]
    return last[:-1] if last.endswith("s") and not last.endswith("ss") and len(last) > 3 else last


def split_by_concept(
    candidates: Sequence[Candidate],
    test_size: int,
    seed: str,
    for_test: Callable[[Candidate], bool] = lambda _: True,
) -> tuple[list[Candidate], list[Candidate]]:
    """Split into train and test, both in the given order; no concept is in both.

    The test split is filled concept by concept, in an order drawn from `seed`, up to a number of
    items per class that grows with the square root of the class: rare classes count, and no class
    dominates. Candidates that are not `for_test` (further variants of others) are for training;
    those of a concept of the test split are left out.
    """
    core = [candidate for candidate in candidates if for_test(candidate)]
    sizes = Counter(candidate.answer for candidate in core)
    total = sum(size**0.5 for size in sizes.values())
    room = {
        answer: min(round(test_size * size**0.5 / total), int(MAX_TEST_SHARE * size))
        for answer, size in sizes.items()
    }
    concepts: dict[str, Counter[str]] = defaultdict(Counter)
    for candidate in core:
        concepts[candidate.concept][candidate.answer] += 1
    chosen = set()
    for concept in sorted(concepts, key=lambda name: _draw(seed, name)):
        needed = concepts[concept]
        if all(count <= room[answer] for answer, count in needed.items()):
            chosen.add(concept)
            for answer, count in needed.items():
                room[answer] -= count
    train = [candidate for candidate in candidates if candidate.concept not in chosen]
    test = [candidate for candidate in core if candidate.concept in chosen]
    return train, test


def _draw(seed: str, name: str) -> str:
    return hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()
