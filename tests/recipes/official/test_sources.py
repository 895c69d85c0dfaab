"""Annotation tables as people keep them, media in folders and hostile archives."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from mera_ds.errors import DataError
from mera_ds.recipes.msvd import read_mapping
from mera_ds.recipes.official.contents import draw
from mera_ds.recipes.official.sources import MediaFiles, read_csv

COLUMNS = ("name", "text")


def rows(path: Path, content: bytes) -> list[tuple[str, ...]]:
    path.write_bytes(content)
    return list(read_csv(path, COLUMNS))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "table.csv"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"name,text\na,b\n", [("a", "b")]),
        (b"text, other ,name\r\nb,x,a\r\n\r\n", [("a", "b")]),
        (b"\xef\xbb\xbfname,text\ra,b", [("a", "b")]),
        (b'name,text\na,"b, ""c"""\n', [("a", 'b, "c"')]),
        (b'name,text\na,"two\nlines"\nc,d\n', [("a", "two\nlines"), ("c", "d")]),
        (b'name,text\na,"stray\nb,stray"\nc,d\n', [("a", "stray"), ("b", "stray"), ("c", "d")]),
        (b"name,text\na,caf\xe9\n", [("a", "caf\u00e9")]),
        ("name,text\na,caf\u00e9\n".encode(), [("a", "caf\u00e9")]),
        (b"name,text\n", []),
    ],
)
def test_csv(table: Path, content: bytes, expected: list[tuple[str, ...]]) -> None:
    assert rows(table, content) == expected


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"a,b\n", "no column name, text in its header"),
        (b"", "no column name, text"),
        (b"name,text\na,b\nc\n", "line 3: 1 columns, its header has 2"),
        (b"name,text\na,b,c\n", "line 2: 3 columns"),
        (b"name,text\na," + b"x" * (1 << 21), "line 2: field larger than field limit"),
    ],
)
def test_csv_that_is_something_else(table: Path, content: bytes, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        rows(table, content)


@pytest.mark.parametrize("line", ["clip", "clip vid0", "clip 3", "clip vid1 x", "other vid1"])
def test_mapping_that_is_something_else(tmp_path: Path, line: str) -> None:
    path = tmp_path / "youtube_mapping.txt"
    path.write_text(f"clip vid1\n{line}\n")
    with pytest.raises(DataError, match=r"youtube_mapping\.txt, line 2"):
        read_mapping(path)


def test_members_outside_of_an_archive_are_passed_over(tmp_path: Path) -> None:
    archive = tmp_path / "media.zip"
    with zipfile.ZipFile(archive, "w") as target:
        target.writestr("../x.wav", b"outside")
        target.writestr("/y.wav", b"root")
        target.writestr("deep/../z.wav", b"around")
        target.writestr("deep/folder/good.wav", b"good")
    before = sorted(tmp_path.parent.rglob("*"))
    media = MediaFiles((), (archive,))
    assert [media.find([f"{name}.wav"]) for name in "xyz"] == [None] * 3
    found = media.find(["nothing.wav", "good.wav"])
    assert found is not None
    assert (found.read(), found.extension, found.size) == (b"good", "wav", 4)
    assert sorted(tmp_path.parent.rglob("*")) == before, "nothing is extracted"


def test_a_tar_as_downloaded(tmp_path: Path) -> None:
    archive = tmp_path / "media.tar"
    with tarfile.open(archive, "w") as target:
        for name, content in (
            ("media/-good_5_15.avi", b"good"),
            ("../x.avi", b"outside"),
            ("/y.avi", b"root"),
            ("media/last.avi", b"last"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            target.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("media/link.avi")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        target.addfile(link)
    before = sorted(tmp_path.parent.rglob("*"))
    media = MediaFiles((), (archive,))
    assert [media.find([f"{name}.avi"]) for name in ("x", "y", "link")] == [None] * 3
    found, last = media.find(["-good_5_15.avi"]), media.find(["last.avi"])
    assert found is not None
    assert last is not None
    assert (found.read(), found.extension, found.size) == (b"good", "avi", 4)
    assert found.label == f"{archive}!media/-good_5_15.avi"
    assert sorted(tmp_path.parent.rglob("*")) == before, "nothing is extracted"
    with archive.open("r+b") as file:
        file.truncate(last.offset)
    with pytest.raises(OSError, match=r"media\.tar ends within 'media/last\.avi'"):
        last.read()
    with pytest.raises(DataError, match=r"media\.tar is no readable tar archive"):
        MediaFiles((), (archive,)).find(["last.avi"])


def test_folders_come_before_archives(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.wav").write_bytes(b"file")
    with zipfile.ZipFile(tmp_path / "media.zip", "w") as target:
        target.writestr("a.wav", b"member")
    found = MediaFiles((tmp_path / "media",), (tmp_path / "media.zip",)).find(["a.wav"])
    assert found is not None
    assert found.read() == b"file"


def test_broken_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "media.zip").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match=r"media\.zip is no readable zip"):
        MediaFiles((), (tmp_path / "media.zip",)).find(["a.wav"])


def test_draw_is_stable_and_grows() -> None:
    names = [str(number) for number in range(1000)]
    ten = draw(names, 10, 0, "x")
    assert ten == {"302", "32", "402", "483", "517", "521", "55", "840", "850", "982"}
    assert ten < draw(names[::-1], 20, 0, "x")
    assert ten != draw(names, 10, 1, "x")
    assert ten != draw(names, 10, 0, "y")
    assert draw(names, None, 0, "x") == draw(names, 2000, 0, "x") == set(names)
