"""Lint finds every kind of damage, also in folders whose index was made to agree with it."""

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from mera_ds.errors import DataError
from mera_ds.shards.format import Text, member_header
from mera_ds.shards.lint import lint, lint_pair, verify
from mera_ds.shards.writer import RawSample

from .samples import raw_sample, raw_samples, write


def _change_tar(folder: Path, change: Callable[[bytearray], object]) -> Path:
    path = folder / "00001.tar"
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    return path


def _forge(folder: Path, content: bytes) -> None:
    """Replace a tar and let the index state the new size and hash."""
    (folder / "00001.tar").write_bytes(content)
    path = folder / "index.json"
    index = json.loads(path.read_text())
    digest = hashlib.sha256(content).hexdigest()
    index["shards"][1].update(bytes=len(content), sha256=digest)
    path.write_text(json.dumps(index))


def test_sound_folder_has_no_problem(folder: Path) -> None:
    assert lint(folder) == []
    assert verify(folder) == []


def test_one_flipped_bit_in_a_medium(folder: Path) -> None:
    path = _change_tar(folder, lambda tar: tar.__setitem__(900, tar[900] ^ 1))
    for problems in (verify(folder), lint(folder)):
        assert len(problems) == 1
        assert problems[0].startswith(f"{path}: bytes 0 to 10240 have the sha256")


def test_cut_tar(folder: Path) -> None:
    _change_tar(folder, lambda tar: tar.__delitem__(slice(1300, None)))
    problems = lint(folder)
    assert "has 1300 bytes, expected 10240" in problems[0]
    assert any("n02 is lost" in problem for problem in problems)
    assert any("n03 is lost" in problem for problem in problems)
    assert verify(folder) == problems[:1]


@pytest.mark.parametrize("content", [b"", None])
def test_empty_or_missing_tar(folder: Path, content: bytes | None) -> None:
    path = folder / "00001.tar"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert len(lint(folder)) == 1


def _second_header(tar: bytes) -> int:
    return tar.index(b"n03.bin")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (b"\xff" * 512, "is damaged"),
        (bytes(1024), "an end mark at"),
    ],
)
def test_damage_that_webdataset_passes_over(folder: Path, damage: bytes, complaint: str) -> None:
    content = bytearray((folder / "00001.tar").read_bytes())
    start = _second_header(content)
    content[start : start + len(damage)] = damage
    _forge(folder, bytes(content))
    url = str(folder / "00001.tar")
    seen = list(webdataset.WebDataset([url], shardshuffle=False, handler=lambda error: True))
    assert len(seen) == 1, "the loader loses a sample in silence"
    assert [problem for problem in lint(folder) if complaint in problem]


def test_tar_without_an_end_mark(folder: Path) -> None:
    content = (folder / "00001.tar").read_bytes()
    _forge(folder, content.rstrip(b"\0") + bytes(-len(content.rstrip(b"\0")) % 512))
    assert [problem for problem in lint(folder) if "without an end mark" in problem]


def _add(tar: tarfile.TarFile, name: str, size: int = 0, **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(b"x" * size))


@pytest.mark.parametrize(
    ("name", "fields", "complaint"),
    [
        ("../x.bin", {}, "not of the form key.extension"),
        ("/etc/passwd", {}, "not of the form key.extension"),
        ("a/b.bin", {}, "not of the form key.extension"),
        ("n02.bin", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is no plain file"),
        ("n02.bin", {"type": tarfile.LNKTYPE, "linkname": "n03.bin"}, "is no plain file"),
        ("n02.bin", {"type": tarfile.CHRTYPE}, "is no plain file"),
        ("n02.bin", {"type": tarfile.DIRTYPE}, "is no plain file"),
        ("n02.bin", {"pax_headers": {"comment": "c" * 100_000}}, "extended header"),
        ("n" * 300 + ".bin", {}, "is no plain file"),
        ("n02.bin", {}, "comes twice"),
    ],
)
def test_hostile_members(
    folder: Path, name: str, fields: dict[str, object], complaint: str
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        _add(tar, name, **fields)
        _add(tar, "n02.bin", 9000)
    _forge(folder, buffer.getvalue())
    before = sorted(folder.parents[1].rglob("*"))
    assert [problem for problem in lint(folder) if complaint in problem]
    assert sorted(folder.parents[1].rglob("*")) == before, "nothing is extracted"


@pytest.mark.parametrize("size", [10 * 2**30, -512])
def test_member_with_an_absurd_size(folder: Path, size: int) -> None:
    member = tarfile.TarInfo("n02.bin")
    member.size = size
    content = member.tobuf(tarfile.GNU_FORMAT) + bytes(9728)
    _forge(folder, content)
    assert [problem for problem in lint(folder) if f"claims {size} bytes" in problem]


def test_other_members_than_the_index_lists(folder: Path) -> None:
    first = raw_sample(2)
    padded = first.media + bytes(-len(first.media) % 512)
    content = member_header("n99.bin", len(first.media)) + padded
    _forge(folder, content + bytes(10240 - len(content)))
    problems = "\n".join(lint(folder))
    assert "found 'n99.bin' (774 bytes at 512), the index lists 'n02.bin'" in problems
    assert "1 members, the index lists 4" in problems


def test_random_damage_never_breaks_lint(folder: Path) -> None:
    good = (folder / "00001.tar").read_bytes()
    source = random.Random(0)
    for _ in range(150):
        content = bytearray(good)
        for _ in range(source.randint(1, 4)):
            content[source.randrange(5200)] = source.randrange(256)
        _forge(folder, bytes(content[: source.choice([len(content), source.randrange(5000)])]))
        assert isinstance(lint(folder), list)
        if (folder / "00001.tar").stat().st_size != len(good):
            assert lint(folder)


def test_stray_files(folder: Path) -> None:
    (folder / "00009.tar").write_bytes(b"")
    (folder / "00002.tar.partial-77").write_bytes(b"")
    problems = lint(folder)
    assert len(problems) == 2
    assert "00002.tar.partial-77 was left by a killed build" in problems[0]
    assert "00009.tar is not listed" in problems[1]


def test_incomplete_folder(tmp_path: Path) -> None:
    assert "is not a complete shard folder" in lint(tmp_path)[0]
    assert "is not a complete shard folder" in verify(tmp_path)[0]


def test_record_against_index(folder: Path) -> None:
    path = folder / "index.json"
    path.write_text(
        path.read_text()
        .replace('"concept":"number 5"', '"concept":"number V"')
        .replace('["caption",20]', '["caption",21]')
        .replace('"choices":{"qa":["even","odd"]}', '"choices":{"qa":["even"]}')
    )
    problems = lint(folder)
    assert len([p for p in problems if "the answer 'odd' is not one of" in p]) == 6
    assert any("n05: the concept 'number 5', in the index 'number V'" in p for p in problems)
    assert len([p for p in problems if "its texts are not those in the index" in p]) == 2


def test_a_medium_stands_once(tmp_path: Path) -> None:
    twin = RawSample("twin", "bin", raw_sample(3).media, "twin", "x", raw_sample(3).texts)
    write(tmp_path, [*raw_samples(), twin])
    (problem,) = lint(tmp_path)
    assert "twin: the same medium as" in problem
    assert "n03" in problem


def test_media_that_cannot_be_decoded(folder: Path) -> None:
    def decode(extension: str, content: bytes, name: str) -> bytes:
        if content[0] == 5:
            raise DataError(f"{name} is broken ({extension})")
        return content

    (problem,) = lint(folder, decode)
    assert problem == f"{folder / '00002.tar'}: n04.bin is broken (bin)"


def _sample(key: str, media: bytes, concept: str) -> RawSample:
    return RawSample(key, "bin", media, concept, "here", (Text("c0", "caption", "", ("c",)),))


@pytest.mark.parametrize(
    ("test_sample", "complaint"),
    [
        (_sample("b", b"2", "two"), None),
        (_sample("a", b"2", "two"), "the key 'a' stands in"),
        (_sample("b", b"2", "one"), "the concept 'one' stands in"),
        (_sample("b", b"1", "two"), "the medium"),
    ],
)
def test_splits_share_nothing(
    tmp_path: Path, test_sample: RawSample, complaint: str | None
) -> None:
    train, test = tmp_path / "train", tmp_path / "test"
    write(train, [_sample("a", b"1", "one")])
    write(test, [test_sample], split="test")
    problems = lint_pair(train, test)
    assert len(problems) == (complaint is not None)
    assert all(str(complaint) in problem for problem in problems)


IDS = "".join(f"n{number:02d}#{text}\n" for number in range(12) for text in ("c0", "q0"))


def _write_with_lists(folder: Path) -> None:
    recipe = {"name": "numbers", "texts_per_medium": {"caption": [1, 1], "qa": [1, 1]}}
    files = {"ids.txt": IDS, "left_out.txt": "gone\tno file\n"}
    write(folder, recipe=recipe, files=files)


def test_lists_beside_the_index_are_checked(tmp_path: Path) -> None:
    _write_with_lists(tmp_path)
    assert lint(tmp_path) == []
    (tmp_path / "left_out.txt").unlink()
    (tmp_path / "ids.txt").write_text(IDS.replace("n03#q0\n", ""))
    assert lint(tmp_path) == [
        f"{tmp_path / 'ids.txt'} has changed: its sha256 is not the one in the index",
        f"{tmp_path / 'left_out.txt'} is listed in the index but is no file here",
        f"{tmp_path / 'ids.txt'} does not list the texts that are in the tars",
    ]


def test_number_of_texts_is_checked(tmp_path: Path) -> None:
    _write_with_lists(tmp_path)
    path = tmp_path / "index.json"
    index = json.loads(path.read_text())
    index["recipe"]["texts_per_medium"]["caption"] = [5, 5]
    path.write_text(json.dumps(index))
    (problem,) = lint(tmp_path)
    assert "'caption': [1, 1]" in problem
    assert "its recipe says {'caption': [5, 5]" in problem


def test_list_of_another_folder_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    _write_with_lists(folder)
    (tmp_path / "x").write_text("")
    path = folder / "index.json"
    index = json.loads(path.read_text())
    index["recipe"]["files"]["../x"] = "0"
    path.write_text(json.dumps(index))
    assert lint(folder) == [f"{folder / '../x'} is listed in the index but is no file here"]
