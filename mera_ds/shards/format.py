"""What a shard folder holds: the index, and the record of a sample.

A folder `<dataset>/<split>` holds ordinary WebDataset tars and `index.json`. The index is written
last, so its presence says that the folder is complete. `shards/README.md` describes the format.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from mera_ds.errors import DataError, InputError
from mera_ds.files import read_json, sha256_json

SCHEMA = 1
INDEX_NAME = "index.json"
TASKS = ("caption", "qa")
MAX_MEMBER_BYTES = 1 << 30
"""No medium or record may be larger: it would have to fit in memory in every loader worker."""
BLOCK = tarfile.BLOCKSIZE
REBUILD = "rebuild the folder with `mera-ds shards build`, or copy it again"

_INDEX_FIELDS = (
    *("schema", "dataset", "split", "modality", "licence", "recipe"),
    *("counts", "id_list_sha256", "choices", "shards"),
)

Choices: TypeAlias = Mapping[str, tuple[str, ...] | None]
"""Per task: the closed set of answers, or None if answers are free."""


@dataclass(frozen=True, slots=True)
class TextInfo:
    """What the index says of a text: its task, and its length (question + first answer)."""

    task: str
    chars: int


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
class SampleInfo:
    """Where a sample lies in its tar. Offsets are those of the payloads, in bytes."""

    key: str
    concept: str
    extension: str
    media_offset: int
    media_size: int
    json_offset: int
    json_size: int
    texts: tuple[TextInfo, ...]


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One tar: its name, size, hash and samples."""

    name: str
    bytes: int
    sha256: str
    samples: tuple[SampleInfo, ...]


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

    @cached_property
    def samples(self) -> tuple[SampleInfo, ...]:
        """All samples in order; a sample's position in the dataset is its place here."""
        return tuple(sample for shard in self.shards for sample in shard.samples)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the index's content, and through its hashes of every byte it lists."""
        return sha256_json(index_json(self))


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
    return hashlib.sha256("\n".join(sample.key for sample in samples).encode()).hexdigest()


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
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()


def parse_texts(record: Mapping[str, Any], where: str) -> tuple[Text, ...]:
    """Return the texts of a sample's record.

    Raises:
        DataError: a field is missing, unknown or of the wrong type; the message names `where`.
    """
    texts = []
    for number, value in enumerate(_list(record.get("texts"), f"{where}: texts")):
        place = f"{where}: texts[{number}]"
        fields = _fields(value, ("id", "task", "question", "answers"), place)
        answers = tuple(_text(answer, place) for answer in _list(fields["answers"], place))
        texts.append(
            Text(
                id=_text(fields["id"], place),
                task=_text(fields["task"], place),
                question=_text(fields["question"], place),
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
    record = _fields(value, ("id", "concept", "source", "texts"), where)
    _text(record["concept"], where)
    _text(record["source"], where)
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
    """Read and check the index of a complete shard folder.

    Raises:
        InputError: the folder has no index, so it isn't complete or isn't a shard folder.
        DataError: the index isn't of this format or contradicts itself.
    """
    path = folder / INDEX_NAME
    if not path.exists():
        raise InputError(
            f"{folder} has no {INDEX_NAME}, so it is not a complete shard folder; run its "
            "`mera-ds shards build` again, it continues where it stopped"
        )
    where = str(path)
    try:
        value = read_json(path)
    except InputError as error:
        raise DataError(str(error)) from None
    fields = _fields(value, _INDEX_FIELDS, where)
    if fields["schema"] != SCHEMA:
        raise DataError(f"{where}: schema {fields['schema']!r}, expected {SCHEMA}; {REBUILD}")
    index = ShardIndex(
        dataset=_text(fields["dataset"], f"{where}: dataset"),
        split=_text(fields["split"], f"{where}: split"),
        modality=_text(fields["modality"], f"{where}: modality"),
        licence=_text(fields["licence"], f"{where}: licence"),
        recipe=_mapping(fields["recipe"], f"{where}: recipe"),
        counts=_mapping(fields["counts"], f"{where}: counts"),
        choices=_parse_choices(fields["choices"], f"{where}: choices"),
        id_list_sha256=_text(fields["id_list_sha256"], f"{where}: id_list_sha256"),
        shards=tuple(
            parse_shard(value, f"{where}: shards[{number}]")
            for number, value in enumerate(_list(fields["shards"], f"{where}: shards"))
        ),
    )
    _check_index(index, where)
    return index


def _check_index(index: ShardIndex, where: str) -> None:
    counted = count_samples(index.samples)
    if dict(index.counts) != counted:
        raise DataError(
            f"{where}: counts say {dict(index.counts)}, its samples are {counted}; {REBUILD}"
        )
    if index.id_list_sha256 != hash_keys(index.samples):
        raise DataError(f"{where}: id_list_sha256 is not that of its sample keys; {REBUILD}")
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
    fields = _fields(value, ("qa",), where)
    closed = fields["qa"]
    if closed is None:
        return {"qa": None}
    return {"qa": tuple(_text(answer, where) for answer in _list(closed, where))}


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
    fields = _fields(value, ("name", "bytes", "sha256", "samples"), where)
    name = _text(fields["name"], f"{where}: name")
    if not re.fullmatch(r"\d{5,}\.tar", name):
        raise DataError(f"{where}: the shard name {name!r} is not like 00000.tar; {REBUILD}")
    size = _integer(fields["bytes"], f"{where}: bytes")
    samples = tuple(
        _parse_sample(sample, size, f"{where}: samples[{number}]")
        for number, sample in enumerate(_list(fields["samples"], f"{where}: samples"))
    )
    return ShardInfo(name, size, _text(fields["sha256"], f"{where}: sha256"), samples)


def _parse_sample(value: Any, shard_size: int, where: str) -> SampleInfo:
    fields = _fields(value, ("key", "concept", "media", "json", "texts"), where)
    extension, media_offset, media_size = _list(fields["media"], where, 3)
    json_offset, json_size = _list(fields["json"], where, 2)
    for offset, size in ((media_offset, media_size), (json_offset, json_size)):
        end = _integer(offset, where) + _integer(size, where)
        if end > shard_size or size > MAX_MEMBER_BYTES:
            raise DataError(
                f"{where}: {size} bytes at {offset} do not fit in a shard of {shard_size} bytes "
                f"(at most {MAX_MEMBER_BYTES} a member); {REBUILD}"
            )
    return SampleInfo(
        key=_text(fields["key"], where),
        concept=_text(fields["concept"], where),
        extension=_text(extension, where),
        media_offset=media_offset,
        media_size=media_size,
        json_offset=json_offset,
        json_size=json_size,
        texts=tuple(_parse_text_info(pair, where) for pair in _list(fields["texts"], where)),
    )


def _parse_text_info(value: Any, where: str) -> TextInfo:
    task, chars = _list(value, where, 2)
    if task not in TASKS:
        raise DataError(f"{where}: unknown task {task!r}; {REBUILD}")
    return TextInfo(task, _integer(chars, where))


def _fields(value: Any, names: tuple[str, ...], where: str) -> dict[str, Any]:
    fields = _mapping(value, where)
    if fields.keys() == set(names):
        return fields
    missing = [name for name in names if name not in fields]
    unknown = [name for name in fields if name not in names]
    raise DataError(
        f"{where}: missing keys {missing}, unknown keys {unknown}; {REBUILD} (or use the version "
        "of mera-ds that wrote it)"
    )


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, found {value!r:.60}; {REBUILD}")
    return value


def _list(value: Any, where: str, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        wanted = "a list" if length is None else f"a list of {length}"
        raise DataError(f"{where}: expected {wanted}, found {value!r:.60}; {REBUILD}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected a string, found {value!r:.60}; {REBUILD}")
    return value


def _integer(value: Any, where: str) -> int:
    if type(value) is not int or value < 0:
        raise DataError(f"{where}: expected a whole number >= 0, found {value!r:.60}; {REBUILD}")
    return value
