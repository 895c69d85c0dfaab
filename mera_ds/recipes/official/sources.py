"""The user's copy of a dataset: annotation files, and media in folders, zip or tar archives.

Nothing is extracted. Members are found by their file name alone, and those that would lie outside
of the archive's folder (`../x`, `/x`) are passed over.
"""

import csv
import functools
import json
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mera_ds.errors import DataError, InputError
from mera_ds.files import sha256_file

ANNOTATION_FOLDERS = (".", "annotations", "dataset")
"""Where annotation files may lie below the source folder, in this order."""
_LONGEST_FIELD = 1 << 20


class SourceFolder:
    """The folder given as `--source`. Missing files are collected, to be named all at once."""

    def __init__(self, root: Path, dataset: str) -> None:
        self.root = root
        self._dataset = dataset
        self._missing: list[str] = []
        self._used: dict[str, Path] = {}

    def need(self, name: str, origin: str) -> Path:
        """Return the path of an annotation file; `origin` says where one gets it."""
        path = self.find(name)
        if path is None:
            self._missing.append(f"{name}  ({origin})")
            return self.root / name
        return path

    def need_one_of(self, names: Sequence[str], origin: str) -> Path:
        """Return the path of the first of some annotation files that is there."""
        for name in names:
            if path := self.find(name):
                return path
        return self.need(" or ".join(names), origin)

    def find(self, name: str) -> Path | None:
        """Return the path of an annotation file if it is there, and record that it is used."""
        for folder in ANNOTATION_FOLDERS:
            path = self.root / folder / name
            if path.is_file():
                self.record(name, path)
                return path
        return None

    def record(self, name: str, path: Path) -> None:
        """Record that a file decides about the shards."""
        self._used[name] = path

    def media(
        self,
        folders: Sequence[str],
        archives: Sequence[str],
        origin: str,
        loose: Sequence[str] = (),
    ) -> "MediaFiles":
        """Return the media in those of some folders and archives (patterns) that are there.

        Media with an extension in `loose` may lie beside the annotation files, too.
        """
        found = [self.root / folder for folder in folders if (self.root / folder).is_dir()]
        if any(path.suffix[1:].lower() in loose for path in self.root.iterdir()):
            found.append(self.root)
        packed = sorted({path for pattern in archives for path in self.root.glob(pattern)})
        if not found and not packed:
            places = [f"{folder}/" for folder in folders]
            self._missing.append(f"{' or '.join([*places, *archives])}  ({origin})")
        return MediaFiles(tuple(found), tuple(packed))

    def require_all(self) -> None:
        """Raise `InputError` naming every file that was needed and not found."""
        if self._missing:
            lines = "\n  ".join(self._missing)
            raise InputError(
                f"--source {self.root} lacks files of {self._dataset} (see shards/README.md, "
                f'"Published datasets"):\n  {lines}'
            )

    def hashes(self) -> Mapping[str, str]:
        """Return name -> SHA-256 of the annotation files used so far."""
        return {name: sha256_file(path) for name, path in sorted(self._used.items())}


@dataclass(frozen=True)
class MediaFile:
    """A file, or the member of an archive."""

    path: Path
    member: str | None
    size: int
    offset: int | None = None
    """Where its content begins in a tar; None for members of a zip, and for files."""

    @property
    def name(self) -> str:
        """The file's own name."""
        return PurePosixPath(self.member).name if self.member else self.path.name

    @property
    def label(self) -> str:
        """What messages and records call it."""
        return f"{self.path}!{self.member}" if self.member else str(self.path)

    @property
    def extension(self) -> str:
        """The extension without its dot, in lower case."""
        return self.name.rpartition(".")[2].lower()

    def read(self) -> bytes:
        """Return the content; `OSError` or `zipfile.BadZipFile` if it can't be read."""
        if self.member is None:
            return self.path.read_bytes()
        if self.offset is None:
            return _zip(self.path).read(self.member)
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(f"{self.path} ends within '{self.member}'")
        return content


@functools.lru_cache(maxsize=64)
def _zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no readable zip archive ({error}); fetch it again") from None


def _members(path: Path) -> Iterator[MediaFile]:
    """Yield the files in an archive, but links and what would lie outside of its folder."""
    for member in _tar_members(path) if path.suffix == ".tar" else _zip_members(path):
        inner = PurePosixPath(member.member or "")
        if not inner.is_absolute() and ".." not in inner.parts:
            yield member


def _zip_members(path: Path) -> Iterator[MediaFile]:
    for info in _zip(path).infolist():
        if not info.is_dir():
            yield MediaFile(path, info.filename, info.file_size)


def _tar_members(path: Path) -> Iterator[MediaFile]:
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                if info.isreg() and not info.issparse():
                    yield MediaFile(path, info.name, info.size, info.offset_data)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path} is no readable tar archive ({error}); fetch it again") from None


class MediaFiles:
    """Media by file name, in some folders (not in theirs) and some archives, in this order."""

    def __init__(self, folders: Sequence[Path], archives: Sequence[Path]) -> None:
        self._folders = folders
        self._archives = archives

    def find(self, names: Sequence[str]) -> MediaFile | None:
        """Return the file of the first name that is there."""
        for name in names:
            if path := self._paths.get(name):
                return MediaFile(path, None, path.stat().st_size)
            if member := self._packed.get(name):
                return member
        return None

    @functools.cached_property
    def _paths(self) -> Mapping[str, Path]:
        found: dict[str, Path] = {}
        for folder in self._folders:
            for path in folder.iterdir():
                if path.is_file():
                    found.setdefault(path.name, path)
        return found

    @functools.cached_property
    def _packed(self) -> Mapping[str, MediaFile]:
        found: dict[str, MediaFile] = {}
        for path in self._archives:
            for member in _members(path):
                found.setdefault(member.name, member)
        return found


def read_json(path: Path) -> Any:
    """Read an annotation file; `DataError` if it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); fetch it again") from None


def records(value: Any, key: str | None, path: Path, **kinds: type) -> Iterator[tuple[Any, ...]]:
    """Yield the fields named by `kinds` of every object in a list.

    Args:
        value: the content of a JSON file.
        key: where the list stands in it; None: it is the content itself.
        path: the file, for messages.
        kinds: name and type of the fields; others may be there and aren't looked at.

    Raises:
        DataError: a field is missing or of another type; the message names record and field.
    """
    found = value.get(key) if key is not None and isinstance(value, dict) else value
    place = f"{path}: {key}" if key is not None else str(path)
    if not isinstance(found, list):
        raise DataError(f"{place}: expected a list; is it the file that its name says?")
    for number, record in enumerate(found):
        fields = record if isinstance(record, dict) else {}
        for name, kind in kinds.items():
            if type(fields.get(name)) is not kind:
                raise DataError(
                    f"{place}[{number}]: '{name}' is {fields.get(name)!r:.60}, expected "
                    f"{kind.__name__}; is it the file that its name says?"
                )
        yield tuple(fields[name] for name in kinds)


def read_text(path: Path) -> str:
    """Read a text file in UTF-8 or, where it isn't, in Latin-1 (which takes every byte)."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def read_lines(path: Path) -> list[str]:
    """Read a text file's lines; only line feeds and carriage returns end one."""
    return read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield the named columns of every row of a CSV file with a header.

    A quotation mark that stands on one side only is left away, where a CSV reader would join the
    rows up to the next one.

    Raises:
        DataError: a column is missing, or a row is cut; the message names file and line.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    lines = read_lines(path)
    header = [name.strip().strip('"') for name in lines[0].split(",")]
    if missing := [column for column in columns if column not in header]:
        raise DataError(f"{path}: no column {', '.join(missing)} in its header ({lines[0]:.120})")
    places = [header.index(column) for column in columns]
    for number, row in _csv_rows(lines, len(header), path):
        if len(row) != len(header):
            raise DataError(
                f"{path}, line {number}: {len(row)} columns, its header has {len(header)}"
            )
        yield tuple(row[place] for place in places)


def _csv_rows(lines: list[str], width: int, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield number of the first line and fields of every row behind the header."""
    number = 1
    while number < len(lines):
        first, taken = number, [lines[number]]
        number += 1
        if not taken[0].strip():
            continue
        if taken[0].count('"') % 2 and _stands_alone(lines[first : first + 2], width):
            yield first + 1, [field.strip('"') for field in taken[0].split(",")]
            continue
        while "".join(taken).count('"') % 2 and number < len(lines):
            taken.append(lines[number])
            number += 1
        try:
            yield first + 1, next(csv.reader(["\n".join(taken)], skipinitialspace=True))
        except csv.Error as error:
            raise DataError(f"{path}, line {first + 1}: {error}; fetch it again") from None


def _stands_alone(lines: list[str], width: int) -> bool:
    """Say whether a line with an odd number of quotation marks is a row, not the start of one."""
    own, *following = (line.count(",") + 1 for line in lines)
    return own == width and (not lines[1:] or not lines[1] or following[0] >= width)
