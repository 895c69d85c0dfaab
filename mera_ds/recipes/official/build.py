"""From a dataset's rows to its shard folders: media checked, duplicates joined, splits written."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mera_ds.errors import DataError, InputError
from mera_ds.files import folder_lock, remove_temporaries, sha256_json, write_bytes
from mera_ds.recipes import Log
from mera_ds.recipes.official.contents import Contents, Dataset, Item, group_rows, options_json
from mera_ds.recipes.official.prepare import Checked, Task, Workshop, check_media
from mera_ds.recipes.official.sources import MediaFile, SourceFolder
from mera_ds.shards.format import INDEX_NAME, TASKS, read_index
from mera_ds.shards.lint import verify
from mera_ds.shards.rules import IDS_FILE, LEFT_OUT_FILE
from mera_ds.shards.writer import RawSample, write_shards

SPLITS = ("train", "test")
SCRATCH = ".prepared"
_SHOWN = 10


@dataclass(frozen=True)
class _Split:
    """The media of a split, and those that it lacks."""

    name: str
    items: Sequence[Item]
    files: Mapping[str, MediaFile]
    """Key -> file of those that are there."""


@dataclass(frozen=True)
class _Ready:
    """A split after the check."""

    items: Sequence[Item]
    left_out: Mapping[str, str]
    """Name of a medium -> why it isn't there."""
    joined: int
    """Media that were the same as another one of the split; their texts went to that one."""


def build_dataset(
    dataset: Dataset, source: Path | None, out: Path, log: Log, options: Any, workers: int
) -> list[Path]:
    """Write `<out>/<dataset>/{train,test}` from the official files in `source`.

    Raises:
        InputError: files are missing; all are named.
        DataError: an annotation file isn't what its name says, or more media are missing or
            broken than the option `tolerance` allows.
        LockedError: another process is building this dataset.
    """
    if source is None:
        raise InputError(
            f"the recipe {dataset.name} needs --source DIR, a folder with the dataset's official "
            'files; shards/README.md, "Published datasets", says which'
        )
    folder = SourceFolder(source, dataset.name)
    contents = dataset.read(folder, options)
    facts = {
        "name": dataset.name,
        "version": dataset.version,
        "options": options_json(options),
        "annotations": folder.hashes(),
        "dropped": dict(sorted(contents.dropped.items())),
    }
    splits = [_find_media(contents, name) for name in SPLITS]
    facts["inputs_sha256"] = _inputs_hash(facts, splits)
    folders = [out / dataset.name / name for name in SPLITS]
    if _is_complete(folders, facts["inputs_sha256"]):
        log(f"{out / dataset.name}: complete, of just these files and options")
        return folders
    scratch = out / dataset.name / SCRATCH
    for split in splits:
        _require_share(split, _missing(split), options.tolerance, scratch)
    with folder_lock(scratch):
        remove_temporaries(scratch)
        ready = _check(contents, splits, scratch, options.tolerance, workers)
        for split, writable, target in zip(splits, ready, folders, strict=True):
            _write(dataset, split.name, writable, facts, target, workers)
            _report(target, writable, log)
    shutil.rmtree(scratch)
    return folders


def _find_media(contents: Contents, name: str) -> _Split:
    items = group_rows(contents.train if name == "train" else contents.test)
    if not items:
        raise InputError(
            f"no {name} sample is left by the filters "
            f"({dict(contents.dropped) or 'none dropped'}); check source and options"
        )
    files = {item.key: file for item in items if (file := contents.media.find(item.files))}
    return _Split(name, items, files)


def _inputs_hash(facts: Mapping[str, Any], splits: Sequence[_Split]) -> str:
    """Return the hash of everything that decides about the shards, but for the media's bytes."""
    media = [
        [split.name, item.key, *_name_and_size(split, item), [asdict(t) for t in item.texts]]
        for split in splits
        for item in split.items
    ]
    return sha256_json([facts, media])


def _name_and_size(split: _Split, item: Item) -> tuple[str, int]:
    file = split.files.get(item.key)
    return (file.name, file.size) if file else ("", -1)


def _is_complete(folders: Sequence[Path], inputs: str) -> bool:
    """Say whether both splits were built of these inputs and are undamaged."""
    for folder in folders:
        try:
            if read_index(folder).recipe.get("inputs_sha256") != inputs or verify(folder):
                return False
        except (InputError, DataError):
            return False
    return True


def _missing(split: _Split) -> dict[str, str]:
    return {
        item.source: f"no file {' or '.join(item.files)}"
        for item in split.items
        if item.key not in split.files
    }


def _require_share(
    split: _Split, left_out: Mapping[str, str], tolerance: float, scratch: Path
) -> None:
    """Raise `DataError` if a split lacks more of its media than is tolerated."""
    if len(left_out) <= tolerance * len(split.items):
        return
    report = scratch / f"{split.name}-{LEFT_OUT_FILE}"
    write_bytes(report, _left_out_lines(left_out).encode())
    names = "\n  ".join(f"{name}: {why}" for name, why in list(left_out.items())[:_SHOWN])
    raise DataError(
        f"{len(left_out)} of {len(split.items)} {split.name} media are missing or broken, more "
        f"than tolerance={tolerance} allows; complete the source or raise it (all are named in "
        f"{report}):\n  {names}"
    )


def _left_out_lines(left_out: Mapping[str, str]) -> str:
    return "".join(f"{name}\t{' '.join(why.split())}\n" for name, why in sorted(left_out.items()))


def _check(
    contents: Contents, splits: Sequence[_Split], scratch: Path, tolerance: float, workers: int
) -> list[_Ready]:
    conversion = contents.conversion
    workshop = Workshop(scratch / sha256_json(asdict(conversion))[:12], conversion)
    tasks = {
        item.key: Task(item.key, split.files[item.key])
        for split in splits
        for item in split.items
        if item.key in split.files
    }
    checked = check_media(list(tasks.values()), workshop, workers)
    by_name: dict[str, _Ready] = {}
    taken: dict[str, str] = {}
    for split in reversed(splits):  # what the test split has, training may not have
        left_out = _missing(split)
        for item in split.items:
            if item.key in checked and (problem := checked[item.key].problem):
                left_out[item.source] = problem
        _require_share(split, left_out, tolerance, scratch)
        by_name[split.name] = _join_twins(split, checked, left_out, taken)
    return [_readable(by_name[split.name], tasks, checked, workshop) for split in splits]


def _join_twins(
    split: _Split,
    checked: Mapping[str, Checked],
    left_out: dict[str, str],
    taken: dict[str, str],
) -> _Ready:
    """Join media of equal bytes, and leave out those that the other split has.

    `taken` holds the hashes of the splits before; it is added to.
    """
    others = dict(taken)
    firsts: dict[str, Item] = {}
    joined = 0
    for item in split.items:
        found = checked.get(item.key)
        if found is None or found.problem:
            continue
        if found.sha256 in others:
            left_out[item.source] = f"the same medium as {others[found.sha256]} of the test split"
        elif found.sha256 in firsts:
            firsts[found.sha256] = _with_texts(firsts[found.sha256], item)
            joined += 1
        else:
            firsts[found.sha256] = item
            taken[found.sha256] = item.key
    return _Ready(tuple(firsts.values()), left_out, joined)


def _with_texts(first: Item, twin: Item) -> Item:
    """Return the first of two equal media with the texts of both."""
    ids = {text.id for text in first.texts}
    added = [
        replace(text, id=f"{text.id}-{twin.key}") if text.id in ids else text
        for text in twin.texts
    ]
    return replace(first, texts=(*first.texts, *added))


def _readable(
    ready: _Ready, tasks: Mapping[str, Task], checked: Mapping[str, Checked], workshop: Workshop
) -> "_Writable":
    samples = [
        partial(_read_sample, item, tasks[item.key], checked[item.key], workshop)
        for item in ready.items
    ]
    hashes = [[item.key, checked[item.key].sha256] for item in ready.items]
    return _Writable(ready, samples, sha256_json(hashes))


def _read_sample(item: Item, task: Task, checked: Checked, workshop: Workshop) -> RawSample:
    return RawSample(
        key=item.key,
        extension=checked.extension,
        media=workshop.read(task, checked),
        concept=item.key,
        source=item.source,
        texts=item.texts,
    )
