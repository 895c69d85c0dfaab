"""An index is read strictly, and its fingerprint stands for every byte it lists."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mera_ds.errors import DataError
from mera_ds.shards.format import parse_record, parse_texts, read_index

from .samples import raw_sample, write

Change = Callable[[dict[str, Any]], object]


def _first(index: dict[str, Any]) -> dict[str, Any]:
    return index["shards"][0]["samples"][0]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda index: index.update(colour=1), r"unknown keys \['colour'\]"),
        (lambda index: index.pop("licence"), r"missing keys \['licence'\]"),
        (lambda index: index.update(schema=2), "schema 2, expected 1"),
        (lambda index: index.update(dataset=3), "dataset: expected a string, found 3"),
        (lambda index: index.update(recipe=[]), "recipe: expected an object"),
        (lambda index: index.update(shards={}), "shards: expected a list"),
        (lambda index: index.update(id_list_sha256="0"), "id_list_sha256 is not that of"),
        (lambda index: index.update(choices={"caption": None}), "choices: missing keys"),
        (lambda index: index["counts"].update(qa=11), "counts say"),
        (lambda index: index["shards"].pop(), "counts say"),
        (lambda index: index["shards"][1].update(name="../00001.tar"), "the shard name"),
        (lambda index: index["shards"][1].update(bytes=True), r"shards\[1\]: bytes: expected"),
        (lambda index: index["shards"][1].pop("sha256"), r"shards\[1\]: missing keys"),
        (lambda index: _first(index).update(extra=0), r"samples\[0\]: .*unknown keys"),
        (lambda index: _first(index).update(media=["bin", 512]), "a list of 3"),
        (lambda index: _first(index).update(media=["bin", -1, 5]), "a whole number >= 0"),
        (lambda index: _first(index).update(json=[9000, 5000]), "5000 bytes at 9000 do not fit"),
        (lambda index: _first(index).update(texts=[["ocr", 1]]), "unknown task 'ocr'"),
    ],
)
def test_other_indexes_are_refused(folder: Path, change: Change, complaint: str) -> None:
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match=complaint):
        read_index(folder)


def test_duplicate_key_is_refused_with_both_places(folder: Path) -> None:
    path = folder / "index.json"
    index = json.loads(path.read_text())
    index["shards"][4]["samples"][0]["key"] = "n00"
    keys = [sample["key"] for shard in index["shards"] for sample in shard["samples"]]
    index["id_list_sha256"] = hashlib.sha256("\n".join(keys).encode()).hexdigest()
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"'n00' stands in 00000.tar and in 00004.tar"):
        read_index(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
def test_broken_index_is_refused(folder: Path, content: bytes) -> None:
    (folder / "index.json").write_bytes(content)
    with pytest.raises(DataError, match=r"index\.json"):
        read_index(folder)


def test_fingerprint_follows_the_content(folder: Path, tmp_path: Path) -> None:
    fingerprint = read_index(folder).fingerprint
    assert fingerprint == write(tmp_path / "again").fingerprint
    others = [
        write(tmp_path / "a", licence="other"),
        write(tmp_path / "b", [raw_sample(number) for number in range(11)]),
        write(tmp_path / "c", choices=None),
    ]
    assert len({fingerprint, *(index.fingerprint for index in others)}) == 4


def test_positions_run_through_all_shards(folder: Path) -> None:
    index = read_index(folder)
    assert [sample.key for sample in index.samples] == [f"n{number:02d}" for number in range(12)]


@pytest.mark.parametrize(
    "texts",
    [
        None,
        "text",
        [{"id": "c0", "task": "caption", "question": ""}],
        [{"id": "c0", "task": "caption", "question": "", "answers": "one"}],
        [{"id": "c0", "task": "caption", "question": None, "answers": []}],
        [{"id": "c0", "task": "caption", "question": "", "answers": [1]}],
    ],
)
def test_other_texts_are_refused(texts: object) -> None:
    with pytest.raises(DataError, match=r"sample.json: texts"):
        parse_texts({"texts": texts}, "sample.json")


@pytest.mark.parametrize("record", [b"", b"[]", b'{"id":"a"}', b"\xff"])
def test_other_records_are_refused(record: bytes) -> None:
    with pytest.raises(DataError, match=r"a\.json"):
        parse_record(record, "a", "a.json")
