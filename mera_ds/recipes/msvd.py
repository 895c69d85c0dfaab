"""Recipe `msvd`: captions of the Microsoft video description corpus (Chen & Dolan 2011).

Training: every caption of the first 1,200 clips. Test: the last 670 clips, each with all its
captions. The clips between are the validation split, which the paper doesn't use.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mera_ds.errors import DataError, InputError
from mera_ds.recipes.official.contents import (
    CommonOptions,
    Contents,
    Dataset,
    Row,
    caption,
    draw_media,
    full_rows,
)
from mera_ds.recipes.official.convert import Conversion
from mera_ds.recipes.official.sources import MediaFiles, SourceFolder, read_csv, read_lines

LAST_TRAIN = 1200
LAST_VALIDATION = 1300
LICENCE = "not stated by the authors; for research"
MAPPING_ORIGIN = "github.com/xudejing/video-question-answering, MSVD-QA"
CLIPS_ORIGIN = "cs.utexas.edu/users/ml/clamp/videoDescription, unpacked or not"
EXTENSIONS = ("avi", "mp4", "mkv")
CAPTIONS = ("AllVideoDescriptions.txt", "video_corpus.csv")
CAPTIONS_ORIGIN = "cs.utexas.edu/users/ml/clamp/videoDescription"


@dataclass(frozen=True, kw_only=True)
class VideoOptions(CommonOptions):
    """Options of the recipes on these clips."""

    frames: int = 4
    """Evenly spaced frames that are stored of a clip, first and last included; 0: the file."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.frames < 0:
            raise InputError(f"frames is {self.frames}; it must be at least 0")


@dataclass(frozen=True, kw_only=True)
class Options(VideoOptions):
    """Options of `msvd`."""

    test_size: int | None = None


def read(source: SourceFolder, options: Options) -> Contents:
    """Return training and test rows."""
    captions_file = source.need_one_of(CAPTIONS, CAPTIONS_ORIGIN)
    mapping_file = source.need("youtube_mapping.txt", MAPPING_ORIGIN)
    media = clips(source)
    source.require_all()
    names = read_mapping(mapping_file)
    numbers = {name: number for number, name in names.items()}
    dropped: Counter[str] = Counter()
    seen: Counter[int] = Counter()
    rows: dict[str, list[Row]] = {"train": [], "test": []}
    for name, text in _captions(captions_file):
        number = numbers.get(name)
        split = None if number is None else split_of(number)
        if number is None or split is None:
            dropped["clip unknown" if number is None else "validation split"] += 1
            continue
        rows[split].append(clip_row(number, name, caption(seen[number], text)))
        seen[number] += 1
    for each in rows.values():
        each.sort(key=lambda row: int(row.key.removeprefix("vid")))  # keeps a clip's order
    return Contents(
        full_rows(rows["train"], dropped),
        draw_media(full_rows(rows["test"], dropped), options.test_size, options.seed, "msvd/test"),
        media,
        Conversion("video", frames=options.frames),
        dropped,
    )


def clips(source: SourceFolder) -> MediaFiles:
    """Return the video files."""
    archives = ("YouTubeClips.tar", "YouTubeClips.zip")
    return source.media(("YouTubeClips",), archives, CLIPS_ORIGIN, loose=EXTENSIONS)


def clip_row(number: int, name: str, text: Any) -> Row:
    """Return a row on clip `vid<number>`; names of clips may start with `-`, keys may not."""
    return Row(f"vid{number}", name, tuple(f"{name}.{end}" for end in EXTENSIONS), text)


def split_of(number: int) -> str | None:
    """Return the split of a clip by its number from 1; None for the validation split."""
    if number <= LAST_TRAIN:
        return "train"
    return None if number <= LAST_VALIDATION else "test"


def read_mapping(path: Path) -> Mapping[int, str]:
    """Return number -> name of the clips in `youtube_mapping.txt`: lines `<name> vid<number>`."""
    names: dict[int, str] = {}
    for line_number, line in enumerate(read_lines(path), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or not re.fullmatch(r"vid[1-9]\d*", words[1]):
            raise DataError(f"{path}, line {line_number}: expected '<clip> vid<number>'")
        number = int(words[1].removeprefix("vid"))
        if names.setdefault(number, words[0]) != words[0]:
            raise DataError(f"{path}, line {line_number}: {words[1]} comes twice")
    return names


def _captions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield name of the clip and caption from either of `CAPTIONS`, English ones."""
    if path.suffix == ".csv":
        columns = ("VideoID", "Start", "End", "Language", "Description")
        for video, start, end, language, text in read_csv(path, columns):
            if language.strip() == "English":
                yield f"{video}_{start}_{end}", text
        return
    for line in read_lines(path):
        words = line.split(maxsplit=1)
        if words and not words[0].startswith("#"):
            yield words[0], words[1] if len(words) > 1 else ""


DATASET = Dataset(
    name="msvd", version=1, modality="video", licence=LICENCE, options=Options, read=read
)
