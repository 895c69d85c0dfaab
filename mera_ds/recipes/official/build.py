"""From a dataset's rows to its shard folders: media checked, duplicates joined, splits written."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mera_ds.errors import DataError, InputError
from mera_ds.files import folder_lock, remove_temporaries, sha256_json
from mera_ds.recipes import Log
from mera_ds.recipes.official.contents import Dataset, Item
from mera_ds.recipes.official.prepare import Checked, Task, Workshop, check_media
from mera_ds.recipes.official.sources import SourceFolder
from mera_ds.recipes.official.splits import (
    Sound,
    Split,
    find_media,
    left_out_lines,
    require_share,
    sound_splits,
)
from mera_ds.shards.format import ShardIndex, read_index
from mera_ds.shards.lint import verify
from mera_ds.shards.rules import IDS_FILE, LEFT_OUT_FILE, id_lines, texts_per_medium
from mera_ds.shards.writer import DEFAULT_SHARD_BYTES, RawSample, write_shards

SPLITS = ("train", "test")
SCRATCH = ".prepared"
_READERS = 8
_SHOWN = 5


@dataclass(frozen=True)
class _Media:
    """All media of a dataset after the check, by key."""

    tasks: Mapping[str, Task]
    checked: Mapping[str, Checked]
    workshop: Workshop

    def read(self, item: Item) -> RawSample:
        """Return a medium with its texts, as it is stored."""
        checked = self.checked[item.key]
        return RawSample(
            key=item.key,
            extension=checked.extension,
            media=self.workshop.read(self.tasks[item.key], checked),
            concept=item.key,
            source=item.source,
            texts=item.texts,
        )


def build_dataset(
    dataset: Dataset,
    source: Path | None,
    out: Path,
    log: Log,
    options: Any,
    workers: int,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
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
    splits = [find_media(contents, name) for name in SPLITS]
    facts: dict[str, Any] = {
        "name": dataset.name,
        "version": dataset.version,
        "options": options.recorded(),
        "annotations": folder.hashes(),
        "dropped": dict(sorted(contents.dropped.items())),
    }
    facts["inputs_sha256"] = _inputs_hash(facts, splits)
    folders = [out / dataset.name / name for name in SPLITS]
    scratch = out / dataset.name / SCRATCH
    if not scratch.exists() and _is_complete(folders, facts["inputs_sha256"]):
        log(f"{out / dataset.name}: complete, of just these files and options")
        return folders
    for split in splits:
        require_share(split, split.missing, options.tolerance, scratch)
    with folder_lock(scratch):
        remove_temporaries(scratch)
        workshop = Workshop.for_conversion(scratch, contents.conversion)
        tasks = _tasks(splits)
        checked = check_media(list(tasks.values()), workshop, workers, log)
        media = _Media(tasks, checked, workshop)
        sound = sound_splits(splits, checked, options.tolerance, scratch)
        for name, content, target in zip(SPLITS, sound, folders, strict=True):
            _log_left_out(log, target, content)
            index = _write(dataset, name, content, media, facts, target, shard_bytes)
            log(f"{target}: {index.counts['samples']} media, {index.counts['texts']} texts")
    shutil.rmtree(scratch)
    return folders


def _inputs_hash(facts: Mapping[str, Any], splits: Sequence[Split]) -> str:
    """Return the hash of everything that decides about the shards, but for the media's bytes."""
    media = [
        [split.name, item.key, *_name_and_size(split, item), [asdict(t) for t in item.texts]]
        for split in splits
        for item in split.items
    ]
    return sha256_json([facts, media])


def _name_and_size(split: Split, item: Item) -> tuple[str, int]:
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


def _tasks(splits: Sequence[Split]) -> dict[str, Task]:
    """Return what is to be checked, by key.

    Raises:
        DataError: a medium is in both splits.
    """
    tasks: dict[str, Task] = {}
    for split in splits:
        for item in split.items:
            if item.key in tasks:
                raise DataError(f"{item.source} is in both splits; check the annotation files")
            if item.key in split.files:
                tasks[item.key] = Task(item.key, split.files[item.key])
    return tasks


def _log_left_out(log: Log, target: Path, content: Sound) -> None:
    if content.joined:
        log(f"{target}: {content.joined} media are there twice; their texts are joined")
    if content.left_out:
        names = ", ".join(sorted(content.left_out)[:_SHOWN])
        more = ", …" if len(content.left_out) > _SHOWN else ""
        log(
            f"{target}: {len(content.left_out)} media left out ({names}{more}); see {LEFT_OUT_FILE}"
        )


def _write(
    dataset: Dataset,
    split: str,
    content: Sound,
    media: _Media,
    facts: Mapping[str, Any],
    target: Path,
    shard_bytes: int,
) -> ShardIndex:
    texts = [(item.key, item.texts) for item in content.items]
    files = {IDS_FILE: id_lines(texts)}
    if content.left_out:
        files[LEFT_OUT_FILE] = left_out_lines(content.left_out)
    recipe = {
        **facts,
        "media": {"left_out": len(content.left_out), "joined": content.joined},
        "media_sha256": sha256_json([[i.key, media.checked[i.key].sha256] for i in content.items]),
        "texts_per_medium": texts_per_medium(texts for _, texts in texts),
    }
    return write_shards(
        target,
        dataset=dataset.name,
        split=split,
        modality=dataset.modality,
        samples=[partial(media.read, item) for item in content.items],
        licence=dataset.licence,
        recipe=recipe,
        shard_bytes=shard_bytes,
        readers=_READERS,
        files=files,
    )
