"""Recipe `audiocaps`: AudioCaps (Kim et al. 2019), paper Appendix A.

Training: the captions whose clips can still be had (the paper had 44K of 49,838). Test: clips
with their five captions. The sounds are the user's own copies, from YouTube.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mera_ds.recipes.official.contents import (
    CommonOptions,
    Contents,
    Dataset,
    Row,
    caption,
    draw_media,
    draw_rows,
    full_rows,
)
from mera_ds.recipes.official.convert import Conversion
from mera_ds.recipes.official.sources import SourceFolder, read_csv

ORIGIN = "github.com/cdjkim/audiocaps, dataset/"
SOUNDS_ORIGIN = "your copies of the clips: {youtube_id}_{start}.wav, {audiocap_id}.wav or Y{…}.wav"
BAD_CLIPS = frozenset(
    ("2sh7ZkazyO8", "966jA2-z0mQ", "52RlolYyjAE", "HVAc9hm4jjk", "8lPjqvYWNyM", "eXgPnnE3TuQ")
)
"""Left out by LAVIS, since their sounds are damaged."""
REFERENCES = 5
EXTENSIONS = ("wav", "flac")
FOLDERS = ("audio", "audio/train", "audio/test", "train", "test", "data")


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Options of `audiocaps`."""

    tolerance: float = 0.15
    """Clips vanish from YouTube: the paper's authors had 88 % of them."""
    test_unit: Literal["clips", "rows"] = "clips"
    """`clips`: test_size clips with their five captions; `rows`: test_size single captions."""


def read(source: SourceFolder, options: Options) -> Contents:
    """Return training and test rows."""
    train_file = source.need("train.csv", ORIGIN)
    test_file = source.need("test.csv", ORIGIN)
    archives = ("*.zip", "audio/*.zip")
    media = source.media(FOLDERS, archives, SOUNDS_ORIGIN, loose=EXTENSIONS)
    source.require_all()
    dropped: Counter[str] = Counter()
    train = full_rows(_rows(train_file, dropped), dropped)
    test = full_rows(_rows(test_file, dropped), dropped)
    if options.test_unit == "rows":
        chosen = draw_rows(test, options.test_size, options.seed, "audiocaps/test")
    else:
        references = Counter(row.key for row in test)
        whole = [row for row in test if references[row.key] >= REFERENCES]
        dropped["test clip with too few captions"] += len(test) - len(whole)
        chosen = draw_media(whole, options.test_size, options.seed, "audiocaps/test")
    return Contents(train, chosen, media, Conversion("audio"), +dropped)


def _rows(path: Path, dropped: Counter[str]) -> list[Row]:
    columns = ("audiocap_id", "youtube_id", "start_time", "caption")
    found = [tuple(value.strip() for value in row) for row in read_csv(path, columns)]
    numbers: dict[tuple[str, str], list[str]] = {}
    for number, video, start, _ in found:
        numbers.setdefault((video, start), []).append(number)
    rows = []
    for number, video, start, text in found:
        if video in BAD_CLIPS:
            dropped["known bad clip"] += 1
            continue
        names = file_names(video, start, numbers[video, start])
        rows.append(Row(f"Y{video}_{start}", f"{video}_{start}", names, caption(number, text)))
    return rows


def file_names(video: str, start: str, numbers: Sequence[str]) -> tuple[str, ...]:
    """Return the names a clip's file may have, in the three conventions that are in use."""
    stems = (f"{video}_{start}", *numbers, f"Y{video}")
    return tuple(f"{stem}.{extension}" for stem in stems for extension in EXTENSIONS)


DATASET = Dataset(
    name="audiocaps",
    version=1,
    modality="audio",
    licence="MIT (captions, for academic use; the sounds are their uploaders')",
    options=Options,
    read=read,
)
