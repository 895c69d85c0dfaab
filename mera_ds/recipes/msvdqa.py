"""Recipe `msvdqa`: MSVD-QA (Xu et al. 2017), questions on the clips of `msvd`, in its splits."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from mera_ds.errors import DataError
from mera_ds.recipes.msvd import MAPPING_ORIGIN, VideoOptions, clip_row, clips, read_mapping
from mera_ds.recipes.official.contents import (
    Contents,
    Dataset,
    Row,
    draw_rows,
    full_rows,
    question,
)
from mera_ds.recipes.official.convert import Conversion
from mera_ds.recipes.official.sources import SourceFolder, read_json, records


def read(source: SourceFolder, options: VideoOptions) -> Contents:
    """Return training and test rows."""
    train_file = source.need("train_qa.json", MAPPING_ORIGIN)
    test_file = source.need("test_qa.json", MAPPING_ORIGIN)
    mapping_file = source.need("youtube_mapping.txt", MAPPING_ORIGIN)
    media = clips(source)
    source.require_all()
    names = read_mapping(mapping_file)
    dropped: Counter[str] = Counter()
    train = full_rows(_questions(train_file, names), dropped)
    test = full_rows(_questions(test_file, names), dropped)
    return Contents(
        train,
        draw_rows(test, options.test_size, options.seed, "msvdqa/test"),
        media,
        Conversion("video", frames=options.frames),
        dropped,
    )


def _questions(path: Path, names: Mapping[int, str]) -> Iterator[Row]:
    found = records(read_json(path), None, path, answer=str, id=int, question=str, video_id=int)
    for answer, number, text, clip in found:
        if clip not in names:
            raise DataError(f"{path}: question {number} is on clip {clip}, which has no name")
        yield clip_row(clip, names[clip], question(number, text, (answer,)))


DATASET = Dataset(
    name="msvdqa",
    version=1,
    modality="video",
    licence="not stated by the authors; for research",
    options=VideoOptions,
    read=read,
)
