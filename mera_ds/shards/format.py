"""What a shard folder holds: the index, and the record of a sample.

A folder `<dataset>/<split>` holds ordinary WebDataset tars and `index.json`. The index is written
last, so its presence says that the folder is complete. `shards/README.md` describes the format.
"""

import dataclasses
import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mera_ds.errors import DataError, InputError
from mera_ds.files import sha256_json
from mera_ds.shards.checks import INDEX_NAME as INDEX_NAME
from mera_ds.shards.checks import REBUILD as REBUILD
from mera_ds.shards.checks import as_integer, as_list, as_mapping, as_text, require_fields
from mera_ds.shards.quarantine import QUARANTINE_NAME, RENEW, Quarantine, read_quarantine
from mera_ds.shards.remote import refresh
from mera_ds.shards.scan import scan_object
from mera_ds.shards.table import TASKS as TASKS
from mera_ds.shards.table import SampleInfo as SampleInfo
from mera_ds.shards.table import SampleTable, TableBuilder, whole_table
from mera_ds.shards.table import TextInfo as TextInfo

SCHEMA = 1
MAX_MEMBER_BYTES = 1 << 30
"""No medium or record may be larger: it would have to fit in memory in every loader worker."""
BLOCK = tarfile.BLOCKSIZE

_INDEX_FIELDS = (
    *("schema", "dataset", "split", "modality", "licence", "recipe"),
    *("counts", "id_list_sha256", "choices", "shards"),
)

Choices: TypeAlias = Mapping[str, tuple[str, ...] | None]
"""Per task: the closed set of answers, or None if answers are free."""


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a medium. `answers[0]` is the training target; all answers count as right."""

    id: str
    task: str
    question: str
    answers: tuple[str, ...]

    @property
    def info(self) -> TextInfo:
        """What the index says of this text."""
        return TextInfo(self.task, len(self.question) + sum(map(len, self.answers[:1])))


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One tar: its name, size, hash and samples."""

    name: str
    bytes: int
    sha256: str
    samples: Sequence[SampleInfo]


@dataclass(frozen=True)
class ShardIndex:
    """The content of `index.json`."""

    dataset: str
    split: str
    modality: str
    licence: str
    recipe: Mapping[str, Any]
    counts: Mapping[str, int]
    choices: Choices
    id_list_sha256: str
    shards: tuple[ShardInfo, ...]
    quarantine: Quarantine | None = None
    """What is left out of the folder, if anything; no part of `index.json`."""

    @cached_property
    def samples(self) -> SampleTable:
        """All samples in order; a sample's position in the dataset is its place here."""
        return whole_table([shard.samples for shard in self.shards])

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the index's content, and through its hashes of every byte it lists.

        What is left out by quarantine is part of it.
        """
        own = hash_index(self)
        return own if self.quarantine is None else sha256_json([own, asdict(self.quarantine)])

    @cached_property
    def usable(self) -> NDArray[np.intp]:
        """Positions of the samples that are not in quarantine, ascending."""
        left_out = self.quarantine.samples if self.quarantine else {}
        if not left_out:
            return np.arange(len(self.samples))
        return np.flatnonzero([key not in left_out for key in self.samples.keys()])

    @cached_property
    def usable_counts(self) -> Mapping[str, int]:
        """The `counts` without what is in quarantine."""
        if self.quarantine is None:
            return self.counts
        return count_samples(self.samples[int(position)] for position in self.usable)


def count_samples(samples: Iterable[SampleInfo]) -> dict[str, int]:
    """Return the index's `counts`: samples, texts, and texts of each task."""
    counts = {"samples": 0, "texts": 0, **dict.fromkeys(TASKS, 0)}
    for sample in samples:
        counts["samples"] += 1
        for text in sample.texts:
            counts["texts"] += 1
            counts[text.task] += 1
    return counts


def hash_keys(samples: Iterable[SampleInfo]) -> str:
    """Return the index's `id_list_sha256`."""
    keys = samples.keys() if isinstance(samples, SampleTable) else (s.key for s in samples)
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def hash_index(index: ShardIndex) -> str:
    """Return `sha256_json(index_json(index))` without holding all of that at once."""
    head = _canonical({**index_json(dataclasses.replace(index, shards=())), "shards": []})
    before, _, behind = head.rpartition('"shards":[]')
    digest = hashlib.sha256(f'{before}"shards":['.encode())
    for number, shard in enumerate(index.shards):
        digest.update(f"{',' if number else ''}{_canonical(shard_json(shard))}".encode())
    digest.update(f"]{behind}".encode())
    return digest.hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def member_header(name: str, size: int) -> bytes:
    """Return the one tar header this format has for a member: a plain file without a date."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)


def padding(size: int, unit: int = BLOCK) -> int:
    """Return how many zero bytes follow `size` bytes up to a multiple of `unit`."""
    return -size % unit


def record_bytes(key: str, concept: str, source: str, texts: Iterable[Text]) -> bytes:
    """Return the content of `{key}.json`."""
    record = {
        "id": key,
        "concept": concept,
        "source": source,
        "texts": [
            {"id": t.id, "task": t.task, "question": t.question, "answers": list(t.answers)}
            for t in texts
        ],
    }
    return _canonical(record).encode()


def parse_texts(record: Mapping[str, Any], where: str) -> tuple[Text, ...]:
    """Return the texts of a sample's record.

    Raises:
        DataError: a field is missing, unknown or of the wrong type; the message names `where`.
    """
    texts = []
    for number, value in enumerate(as_list(record.get("texts"), f"{where}: texts")):
        place = f"{where}: texts[{number}]"
        fields = require_fields(value, ("id", "task", "question", "answers"), place)
        answers = tuple(as_text(answer, place) for answer in as_list(fields["answers"], place))
        texts.append(
            Text(
                id=as_text(fields["id"], place),
                task=as_text(fields["task"], place),
                question=as_text(fields["question"], place),
                answers=answers,
            )
        )
    return tuple(texts)


def parse_record(content: bytes, key: str, where: str) -> dict[str, Any]:
    """Return the record `{key}.json` as a dict with the fields of the format.

    Raises:
        DataError: it isn't such a record, or belongs to another key.
    """
    try:
        value = json.loads(content)
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON ({error}); {REBUILD}") from None
    record = require_fields(value, ("id", "concept", "source", "texts"), where)
    as_text(record["concept"], where)
    as_text(record["source"], where)
    if record["id"] != key:
        raise DataError(f"{where} has the id {record['id']!r}, expected {key!r}; {REBUILD}")
    return record


def index_json(index: ShardIndex) -> dict[str, Any]:
    """Return the index as the JSON value that `index.json` holds."""
    return {
        "schema": SCHEMA,
        "dataset": index.dataset,
        "split": index.split,
        "modality": index.modality,
        "licence": index.licence,
        "recipe": dict(index.recipe),
        "counts": dict(index.counts),
        "id_list_sha256": index.id_list_sha256,
        "choices": {
            task: None if closed is None else list(closed) for task, closed in index.choices.items()
        },
        "shards": [shard_json(shard) for shard in index.shards],
    }


def index_bytes(index: ShardIndex) -> bytes:
    """Return the content of `index.json`: compact, since it has a line's worth per sample."""
    text = json.dumps(index_json(index), separators=(",", ":"), ensure_ascii=False)
    return text.encode() + b"\n"


def read_index(folder: Path) -> ShardIndex:
    """Read and check the index of a complete shard folder, and its quarantine.

    Raises:
        InputError: the folder has no index, so it isn't complete or isn't a shard folder.
        DataError: the index isn't of this format or contradicts itself, or the quarantine
            belongs to another index.
    """
    refresh(folder)
    path = folder / INDEX_NAME
    if not path.exists():
        raise InputError(
            f"{folder} has no {INDEX_NAME}, so it is not a complete shard folder; run its "
            "`mera-ds shards build` again, it continues where it stopped"
        )
    index = _parse_index(path)
    _check_index(index, str(path))
    quarantine = read_quarantine(folder)
    if quarantine is None:
        return index
    if quarantine.index != hash_index(index):
        raise DataError(f"{folder / QUARANTINE_NAME} belongs to another index; {RENEW}")
    unknown = sorted(quarantine.samples.keys() - set(index.samples.keys()))
    if unknown:
        raise DataError(f"{folder / QUARANTINE_NAME} names the unknown {unknown[0]!r}; {RENEW}")
    return dataclasses.replace(index, quarantine=quarantine)


def _parse_index(path: Path) -> ShardIndex:
    where = str(path)
    table = TableBuilder()
    try:
        value = scan_object(
            path.read_text(encoding="utf-8"),
            "shards",
            lambda shard, number: _add_shard(table, shard, f"{where}: shards[{number}]"),
        )
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON ({error}); restore or rebuild it") from None
    fields = require_fields(value, _INDEX_FIELDS, where)
    if fields["schema"] != SCHEMA:
        raise DataError(f"{where}: schema {fields['schema']!r}, expected {SCHEMA}; {REBUILD}")
    heads = as_list(fields["shards"], f"{where}: shards")
    tables = table.build(stop for *_, stop in heads)
    return ShardIndex(
        dataset=as_text(fields["dataset"], f"{where}: dataset"),
        split=as_text(fields["split"], f"{where}: split"),
        modality=as_text(fields["modality"], f"{where}: modality"),
        licence=as_text(fields["licence"], f"{where}: licence"),
        recipe=as_mapping(fields["recipe"], f"{where}: recipe"),
        counts=as_mapping(fields["counts"], f"{where}: counts"),
        choices=_parse_choices(fields["choices"], f"{where}: choices"),
        id_list_sha256=as_text(fields["id_list_sha256"], f"{where}: id_list_sha256"),
        shards=tuple(
            ShardInfo(name, size, sha256, samples)
            for (name, size, sha256, _), samples in zip(heads, tables, strict=True)
        ),
    )


def _check_index(index: ShardIndex, where: str) -> None:
    tasks = index.samples.tasks
    counted = {"samples": len(index.samples), "texts": len(tasks)}
    counted |= {task: int((tasks == number).sum()) for number, task in enumerate(TASKS)}
    if dict(index.counts) != counted:
        raise DataError(
            f"{where}: counts say {dict(index.counts)}, its samples are {counted}; {REBUILD}"
        )
    if index.id_list_sha256 != hash_keys(index.samples):
        raise DataError(f"{where}: id_list_sha256 is not that of its sample keys; {REBUILD}")
    if len(set(index.samples.keys())) < len(index.samples):
        _name_twins(index, where)


def _name_twins(index: ShardIndex, where: str) -> None:
    place: dict[str, str] = {}
    for shard in index.shards:
        for sample in shard.samples:
            if sample.key in place:
                raise DataError(
                    f"{where}: the key {sample.key!r} stands in {place[sample.key]} and in "
                    f"{shard.name}; {REBUILD}"
                )
            place[sample.key] = shard.name


def _parse_choices(value: Any, where: str) -> Choices:
    fields = require_fields(value, ("qa",), where)
    closed = fields["qa"]
    if closed is None:
        return {"qa": None}
    return {"qa": tuple(as_text(answer, where) for answer in as_list(closed, where))}


def shard_json(shard: ShardInfo) -> dict[str, Any]:
    """Return one entry of the index's `shards`."""
    return {
        "name": shard.name,
        "bytes": shard.bytes,
        "sha256": shard.sha256,
        "samples": [
            {
                "key": sample.key,
                "concept": sample.concept,
                "media": [sample.extension, sample.media_offset, sample.media_size],
                "json": [sample.json_offset, sample.json_size],
                "texts": [[text.task, text.chars] for text in sample.texts],
            }
            for sample in shard.samples
        ],
    }


def parse_shard(value: Any, where: str) -> ShardInfo:
    """Read one entry of the index's `shards`; DataError if it isn't one."""
    table = TableBuilder()
    name, size, sha256, stop = _add_shard(table, value, where)
    return ShardInfo(name, size, sha256, table.build([stop])[0])


def _add_shard(table: TableBuilder, value: Any, where: str) -> tuple[str, int, str, int]:
    """Add a shard's samples to a table; return its name, bytes, sha256 and the table's length."""
    fields = require_fields(value, ("name", "bytes", "sha256", "samples"), where)
    name = as_text(fields["name"], f"{where}: name")
    if not re.fullmatch(r"\d{5,}\.tar", name):
        raise DataError(f"{where}: the shard name {name!r} is not like 00000.tar; {REBUILD}")
    size = as_integer(fields["bytes"], f"{where}: bytes")
    for number, sample in enumerate(as_list(fields["samples"], f"{where}: samples")):
        try:
            _add_sample(table, sample, size, "")
        except DataError:  # once more, to name it: names for all would cost more than the rest
            _add_sample(table, sample, size, f"{where}: samples[{number}]")
    return name, size, as_text(fields["sha256"], f"{where}: sha256"), len(table)


def _add_sample(table: TableBuilder, value: Any, shard_size: int, where: str) -> None:
    fields = require_fields(value, ("key", "concept", "media", "json", "texts"), where)
    extension, media_offset, media_size = as_list(fields["media"], where, 3)
    json_offset, json_size = as_list(fields["json"], where, 2)
    for offset, size in ((media_offset, media_size), (json_offset, json_size)):
        end = as_integer(offset, where) + as_integer(size, where)
        if end > shard_size or size > MAX_MEMBER_BYTES:
            raise DataError(
                f"{where}: {size} bytes at {offset} do not fit in a shard of {shard_size} bytes "
                f"(at most {MAX_MEMBER_BYTES} a member); {REBUILD}"
            )
    texts = as_list(fields["texts"], where)
    for text in texts:
        task, chars = as_list(text, where, 2)
        if task not in TASKS:
            raise DataError(f"{where}: unknown task {task!r}; {REBUILD}")
        as_integer(chars, where)
    table.add(
        as_text(fields["key"], where),
        as_text(fields["concept"], where),
        as_text(extension, where),
        (media_offset, media_size, json_offset, json_size),
        texts,
    )
