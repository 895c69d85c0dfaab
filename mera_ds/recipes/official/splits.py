"""The media of a split: which are there, which are missing or broken, which are the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mera_ds.errors import DataError, InputError
from mera_ds.files import write_bytes
from mera_ds.recipes.official.contents import Contents, Item, group_rows
from mera_ds.recipes.official.prepare import Checked
from mera_ds.recipes.official.sources import MediaFile
from mera_ds.shards.rules import LEFT_OUT_FILE

_SHOWN = 10


@dataclass(frozen=True)
class Split:
    """The media of a split, and the files of those that are there."""

    name: str
    items: Sequence[Item]
    files: Mapping[str, MediaFile]
    """Key -> file."""

    @property
    def missing(self) -> dict[str, str]:
        """Name of a medium without a file -> which file it would be."""
        return {
            item.source: f"no file {' or '.join(item.files[:_SHOWN])}"
            for item in self.items
            if item.key not in self.files
        }


@dataclass(frozen=True)
class Sound:
    """What can be written of a split."""

    items: Sequence[Item]
    left_out: Mapping[str, str]
    """Name of a medium -> why it isn't there."""
    joined: int
    """Media that were the same as another one of the split; their texts went to that one."""


def find_media(contents: Contents, name: str) -> Split:
    """Return a split with the files of its media.

    Raises:
        InputError: the filters left nothing.
    """
    items = group_rows(contents.train if name == "train" else contents.test)
    if not items:
        raise InputError(
            f"no {name} sample is left (left out: {dict(contents.dropped) or 'nothing'}); check "
            "the annotation files and the options"
        )
    files = {item.key: file for item in items if (file := contents.media.find(item.files))}
    return Split(name, items, files)


def require_share(
    split: Split, left_out: Mapping[str, str], tolerance: float, scratch: Path
) -> None:
    """Raise `DataError` if a split lacks more of its media than is tolerated.

    All names are written to a report in the folder `scratch`; the message shows the first.
    """
    if len(left_out) <= tolerance * len(split.items):
        return
    report = scratch / f"{split.name}-{LEFT_OUT_FILE}"
    write_bytes(report, left_out_lines(left_out).encode())
    names = "\n  ".join(f"{name}: {why}" for name, why in list(left_out.items())[:_SHOWN])
    raise DataError(
        f"{len(left_out)} of {len(split.items)} {split.name} media are missing or broken, more "
        f"than tolerance={tolerance} allows; complete the source or raise it (all are named in "
        f"{report}):\n  {names}"
    )


def left_out_lines(left_out: Mapping[str, str]) -> str:
    """Return one line for each medium: its name, a tab, why it is left out."""
    return "".join(f"{name}\t{' '.join(why.split())}\n" for name, why in sorted(left_out.items()))


def sound_splits(
    splits: Sequence[Split], checked: Mapping[str, Checked], tolerance: float, scratch: Path
) -> list[Sound]:
    """Return what can be written of the splits `train`, `test`, after all media were checked.

    Raises:
        DataError: one lacks more of its media than `tolerance` allows.
    """
    sound = []
    taken: dict[str, str] = {}
    for split in reversed(splits):  # what the test split has, training may not have
        left_out = split.missing
        for item in split.items:
            if item.key in checked and (problem := checked[item.key].problem):
                left_out[item.source] = problem
        require_share(split, left_out, tolerance, scratch)
        sound.append(_join_twins(split, checked, left_out, taken))
    return sound[::-1]


def _join_twins(
    split: Split, checked: Mapping[str, Checked], left_out: dict[str, str], taken: dict[str, str]
) -> Sound:
    """Join media of equal bytes, and leave out those that another split has.

    `taken` holds hash -> key of the splits before; this split's are added.
    """
    firsts: dict[str, Item] = {}
    joined = 0
    for item in split.items:
        found = checked.get(item.key)
        if found is None or found.problem:
            continue
        if found.sha256 in taken:
            left_out[item.source] = f"the same medium as {taken[found.sha256]} of the test split"
        elif found.sha256 in firsts:
            firsts[found.sha256] = _with_texts(firsts[found.sha256], item)
            joined += 1
        else:
            firsts[found.sha256] = item
    taken |= {sha256: item.key for sha256, item in firsts.items()}
    return Sound(tuple(firsts.values()), left_out, joined)


def _with_texts(first: Item, twin: Item) -> Item:
    """Return the first of two equal media with the texts of both."""
    ids = {text.id for text in first.texts}
    added = [
        replace(text, id=f"{text.id}-{twin.key}") if text.id in ids else text for text in twin.texts
    ]
    return replace(first, texts=(*first.texts, *added))
