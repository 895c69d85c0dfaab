"""Checks shard folders to the last byte and lists what is wrong, without extracting anything.

The tar is walked here block by block: Python's `tarfile` and `webdataset` end in silence at a
damaged header or at zero blocks in the middle, and would give a shorter dataset.
"""

import hashlib
import mmap
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mera_ds.errors import DataError, InputError
from mera_ds.files import TEMPORARY, sha256_file
from mera_ds.shards.format import (
    BLOCK,
    INDEX_NAME,
    MAX_MEMBER_BYTES,
    SampleInfo,
    ShardIndex,
    ShardInfo,
    Text,
    padding,
    parse_record,
    parse_texts,
    read_index,
)
from mera_ds.shards.quarantine import QUARANTINE_NAME
from mera_ds.shards.reader import ShardReader
from mera_ds.shards.rules import IDS_FILE, id_lines, sample_problems, texts_per_medium
from mera_ds.shards.tars import BUILDING

Decode = Callable[[str, bytes, str], object]
"""(extension, content, name for messages) -> the decoded medium; raises DataError if broken."""


@dataclass(frozen=True, slots=True)
class _Member:
    """A file in a tar: as the index has it, or as the tar has it."""

    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.name!r} ({self.size} bytes at {self.offset})"


def verify(folder: Path) -> list[str]:
    """Return the problems that sizes and hashes show: cut, changed or missing tars."""
    try:
        index = read_index(folder)
    except (InputError, DataError) as error:
        return [str(error)]
    return [problem for shard in index.shards for problem in _file_problems(folder, shard)]


def lint(folder: Path, decode: Decode | None = None) -> list[str]:
    """Return all problems of a shard folder; an empty list says that it is sound.

    It checks the index against itself, and every tar against the index: size, hash, headers,
    names, records, texts, no medium twice; with `decode`, that every medium can be decoded.
    """
    try:
        index = read_index(folder)
    except (InputError, DataError) as error:
        return [str(error)]
    problems = [*_stray_files(folder, index), *_side_file_problems(folder, index)]
    seen: dict[str, str] = {}
    texts: list[tuple[str, tuple[Text, ...]]] = []
    for shard in index.shards:
        path = folder / shard.name
        problems += _file_problems(folder, shard)
        if path.is_file() and path.stat().st_size:
            problems += _layout_problems(path, shard)
            problems += _sample_problems(path, index, shard, seen, texts, decode)
    return problems + _text_list_problems(folder, index, texts)


def lint_pair(first: Path, second: Path) -> list[str]:
    """Return what two splits of a dataset share and must not: keys, concepts, media."""
    problems = []
    with ShardReader(first) as one, ShardReader(second) as two:
        for what, values in (("key", _keys), ("concept", _concepts), ("medium", _media_hashes)):
            place = dict(values(one))
            found = dict(values(two))
            problems += [
                f"the {what} {value!r} stands in {first} ({place[value]}) and in {second} "
                f"({found[value]}); leave one out"
                for value in found
                if value in place
            ]
    return problems


def _keys(reader: ShardReader) -> Iterator[tuple[str, str]]:
    for shard in reader.index.shards:
        for sample in shard.samples:
            yield sample.key, shard.name


def _concepts(reader: ShardReader) -> Iterator[tuple[str, str]]:
    for sample in reader.samples:
        yield sample.concept, sample.key


def _media_hashes(reader: ShardReader) -> Iterator[tuple[str, str]]:
    for position in reader.index.usable.tolist():
        yield hashlib.sha256(reader.read_media(position)).hexdigest(), reader.samples.key(position)


def _stray_files(folder: Path, index: ShardIndex) -> list[str]:
    listed = {INDEX_NAME, QUARANTINE_NAME, *_side_files(index)}
    listed |= {shard.name for shard in index.shards}
    problems = []
    for path in sorted(folder.iterdir()):
        if TEMPORARY in path.name or path.name == BUILDING:
            problems.append(f"{path} was left by a killed build; run that build again")
        elif path.name not in listed:
            problems.append(f"{path} is not listed in the index; remove it")
    return problems


def _side_files(index: ShardIndex) -> dict[str, Any]:
    """Return name -> SHA-256 of the files that the index lists beside itself."""
    files = index.recipe.get("files", {})
    return files if isinstance(files, dict) else {}


def _side_file_problems(folder: Path, index: ShardIndex) -> list[str]:
    problems = []
    for name, sha256 in _side_files(index).items():
        path = folder / name
        if path.parent != folder or not path.is_file():
            problems.append(f"{path} is listed in the index but is no file here")
        elif sha256_file(path) != sha256:
            problems.append(f"{path} has changed: its sha256 is not the one in the index")
    return problems


def _text_list_problems(
    folder: Path, index: ShardIndex, texts: Sequence[tuple[str, tuple[Text, ...]]]
) -> list[str]:
    """Compare the texts with the list of ids and the numbers per medium that a recipe states."""
    problems = []
    path = folder / IDS_FILE
    if IDS_FILE in _side_files(index) and path.is_file():
        if path.read_text(encoding="utf-8", errors="replace") != id_lines(texts):
            problems.append(f"{path} does not list the texts that are in the tars")
    stated = index.recipe.get("texts_per_medium")
    if stated is not None:
        found = texts_per_medium(texts for _, texts in texts)
        if stated != found:
            problems.append(
                f"{folder}: texts per medium (least, most) are {found}, its recipe says {stated}"
            )
    return problems


def _file_problems(folder: Path, shard: ShardInfo) -> list[str]:
    path = folder / shard.name
    if not path.is_file() or path.is_symlink():
        return [f"{path} is listed in the index but is no file here"]
    size = path.stat().st_size
    if size != shard.bytes:
        return [f"{path} has {size} bytes, expected {shard.bytes}"]
    found = sha256_file(path)
    if found != shard.sha256:
        return [f"{path}: bytes 0 to {size} have the sha256 {found}, expected {shard.sha256}"]
    return []


def _layout_problems(path: Path, shard: ShardInfo) -> list[str]:
    """Compare the members that lie in a tar with those that the index lists."""
    listed = list(_listed_members(shard))
    found: list[_Member] = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
        try:
            found += _walk(tar)
        except DataError as error:
            return [f"{path}: {error}"]
    problems = []
    names: set[str] = set()
    for member in found:
        if member.name in names:
            problems.append(f"{path}: the member {member.name!r} comes twice")
        names.add(member.name)
    for wanted, member in zip(listed, found, strict=False):
        if wanted != member:
            problems.append(f"{path}: found {member}, the index lists {wanted}")
            break
    if len(found) != len(listed):
        problems.append(f"{path}: {len(found)} members, the index lists {len(listed)}")
    return problems


def _listed_members(shard: ShardInfo) -> Iterator[_Member]:
    for sample in shard.samples:
        media = f"{sample.key}.{sample.extension}"
        yield _Member(media, sample.media_offset, sample.media_size)
        yield _Member(f"{sample.key}.json", sample.json_offset, sample.json_size)


def _walk(tar: mmap.mmap) -> Iterator[_Member]:
    """Yield the members of a tar that holds plain files only.

    Raises:
        DataError: a damaged header, a member that isn't a plain file in the top folder, data
            behind the end mark, or no end mark.
    """
    position = 0
    while position + BLOCK <= len(tar):
        header = tar[position : position + BLOCK]
        if not any(header):
            if any(tar[position:]):
                raise DataError(f"an end mark at {position}, with data behind it")
            return
        member = _parse_header(header, position)
        yield member
        position = member.offset + member.size + padding(member.size)
    raise DataError(f"it ends at {len(tar)} without an end mark")


def _parse_header(header: bytes, position: int) -> _Member:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DataError(f"the header at {position} is damaged ({error})") from None
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise DataError(
            f"{info.name!r} at {position} is no plain file (type {info.type!r}: link, device, "
            "folder, sparse file or extended header)"
        )
    if not 0 <= info.size <= MAX_MEMBER_BYTES:
        raise DataError(f"{info.name!r} at {position} claims {info.size} bytes")
    if "/" in info.name or "\\" in info.name or info.name.startswith("."):
        raise DataError(f"the name {info.name!r} at {position} is not of the form key.extension")
    return _Member(info.name, position + BLOCK, info.size)


def _sample_problems(
    path: Path,
    index: ShardIndex,
    shard: ShardInfo,
    seen: dict[str, str],
    texts: list[tuple[str, tuple[Text, ...]]],
    decode: Decode | None,
) -> list[str]:
    """Check the samples of a tar; hashes and texts are added to `seen` and `texts`."""
    problems = []
    with path.open("rb") as file:
        for sample in shard.samples:
            where = f"{path}: {sample.key}"
            file.seek(sample.media_offset)
            media = file.read(sample.media_size)
            file.seek(sample.json_offset)
            record = file.read(sample.json_size)
            if len(media) + len(record) != sample.media_size + sample.json_size:
                problems.append(f"{where} is lost: the tar ends before it does")
                continue
            twin = seen.setdefault(hashlib.sha256(media).hexdigest(), where)
            if twin != where:
                problems.append(f"{where}: the same medium as {twin}; give it all texts once")
            problems += _record_problems(index, sample, record, texts, where)
            if decode is not None:
                name = f"{where}.{sample.extension}"
                problems += _decode_problems(decode, sample.extension, media, name)
    return problems


def _record_problems(
    index: ShardIndex,
    sample: SampleInfo,
    content: bytes,
    all_texts: list[tuple[str, tuple[Text, ...]]],
    where: str,
) -> list[str]:
    try:
        record = parse_record(content, sample.key, f"{where}.json")
        texts = parse_texts(record, f"{where}.json")
    except DataError as error:
        return [str(error)]
    all_texts.append((sample.key, texts))
    found = sample_problems(
        sample.key, sample.extension, sample.media_size, sample.concept, texts, index.choices
    )
    if record["concept"] != sample.concept:
        found.append(f"the concept {record['concept']!r}, in the index {sample.concept!r}")
    if tuple(text.info for text in texts) != sample.texts:
        found.append("its texts are not those in the index")
    return [f"{where}: {line}" for line in found]


def _decode_problems(decode: Decode, extension: str, media: bytes, name: str) -> list[str]:
    try:
        decode(extension, media, name)
    except DataError as error:
        return [str(error)]
    return []
