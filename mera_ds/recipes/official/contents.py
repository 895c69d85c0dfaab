"""What a recipe says of a dataset: rows of texts, the media that they belong to, and filters."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mera_ds.errors import InputError
from mera_ds.recipes.official.convert import Conversion
from mera_ds.recipes.official.sources import MediaFiles, SourceFolder
from mera_ds.shards.format import Text


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """Options of every dataset."""

    seed: int = 0
    """Decides every random subset."""
    test_size: int | None = 1000
    """Test samples (media for captions, questions for QA), drawn at random; null: all."""
    tolerance: float = 0.02
    """Largest share of a split's media that may be missing or broken."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 <= self.tolerance <= 1:
            raise InputError(f"tolerance is {self.tolerance}; it must be in [0, 1]")
        for name, value in vars(self).items():
            if name.endswith("_size") and value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1 (or null: all)")

    def recorded(self) -> dict[str, Any]:
        """Return the options as the index has them."""
        return dict(vars(self))


@dataclass(frozen=True, slots=True)
class Row:
    """One training or test sample: a text, and the medium it belongs to."""

    key: str
    """The medium's key in the shards."""
    source: str
    """What the dataset calls the medium."""
    files: tuple[str, ...]
    """Names its file may have; the first that is there is taken."""
    text: Text


@dataclass(frozen=True, slots=True)
class Item:
    """A medium with all its texts."""

    key: str
    source: str
    files: tuple[str, ...]
    texts: tuple[Text, ...]


@dataclass(frozen=True)
class Contents:
    """What a recipe found in the annotation files."""

    train: Sequence[Row]
    test: Sequence[Row]
    media: MediaFiles
    conversion: Conversion
    dropped: Counter[str] = field(default_factory=Counter)
    """Why rows were left out by the recipe's filters, and how many."""


@dataclass(frozen=True)
class Dataset:
    """One published dataset."""

    name: str
    version: int
    """Raise it when the same source gives other shards."""
    modality: str
    licence: str
    options: type[Any]
    read: Callable[[SourceFolder, Any], Contents]


def group_rows(rows: Iterable[Row]) -> list[Item]:
    """Put the texts of a medium together; media stay in the order of their first row."""
    first: dict[str, Row] = {}
    texts: dict[str, list[Text]] = {}
    for row in rows:
        first.setdefault(row.key, row)
        texts.setdefault(row.key, []).append(row.text)
    return [Item(key, row.source, row.files, tuple(texts[key])) for key, row in first.items()]


def draw(names: Iterable[str], size: int | None, seed: int, purpose: str) -> set[str]:
    """Return `size` of some distinct names, drawn at random; all if there are no more.

    The order of the draw is that of SHA-256 over seed, purpose and name: it depends on no random
    generator's version, and on the other names only in so far as they compete.
    """
    known = list(names)
    if size is None or size >= len(known):
        return set(known)
    return set(sorted(known, key=lambda name: _rank(name, seed, purpose))[:size])


def _rank(name: str, seed: int, purpose: str) -> bytes:
    return hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest()


def draw_rows(rows: Sequence[Row], size: int | None, seed: int, purpose: str) -> list[Row]:
    """Return `size` rows drawn at random, in their order; a row is known by key and text id."""
    chosen = draw((row_id(row) for row in rows), size, seed, purpose)
    return [row for row in rows if row_id(row) in chosen]


def row_id(row: Row) -> str:
    """Return `key#text`, the name of a sample in `ids.txt`."""
    return f"{row.key}#{row.text.id}"


def draw_media(rows: Sequence[Row], size: int | None, seed: int, purpose: str) -> list[Row]:
    """Return all rows of `size` media drawn at random, in their order."""
    chosen = draw(dict.fromkeys(row.key for row in rows), size, seed, purpose)
    return [row for row in rows if row.key in chosen]


def clean(text: str) -> str:
    """Return a text with every run of white space as one space, and none at its ends."""
    return " ".join(text.split())


def caption(number: object, text: str) -> Text:
    """Return a caption as a text; `number` is unique within the medium."""
    return Text(f"c{number}", "caption", "", (clean(text),))


def question(number: object, text: str, answers: Sequence[str]) -> Text:
    """Return a question as a text; the first answer is the one to train on or to judge by."""
    return Text(f"q{number}", "qa", clean(text), tuple(clean(answer) for answer in answers))


def full_rows(rows: Iterable[Row], dropped: Counter[str]) -> list[Row]:
    """Return the rows without those whose question or answer is empty, which are counted."""
    kept = []
    for row in rows:
        text = row.text
        if all(text.answers) and text.answers and (text.question or text.task == "caption"):
            kept.append(row)
        else:
            dropped["empty text"] += 1
    return kept
