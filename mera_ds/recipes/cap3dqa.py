"""Recipe `cap3dqa`: Cap3D-QA (Panagopoulou et al. 2023), paper Appendix A.

30K random questions of the training file, and 1K of the validation file for the test. No object
of the test is in training.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mera_ds.recipes.cap3d import (
    DAMAGED,
    UID,
    PointOptions,
    excluded_ids,
    object_row,
    point_clouds,
    without,
)
from mera_ds.recipes.official.contents import (
    Contents,
    Dataset,
    Row,
    clean,
    draw_rows,
    full_rows,
    question,
)
from mera_ds.recipes.official.sources import SourceFolder, read_csv

ORIGIN = "storage.googleapis.com/sfr-xinstructblip-data-research/data/objaverse/"
SYNTHETIC_OF = 11
SYNTHETIC = 3
"""Three in eleven training questions are replaced where `synthetic` is on, as in LAVIS."""


@dataclass(frozen=True, kw_only=True)
class Options(PointOptions):
    """Options of `cap3dqa`."""

    train_size: int | None = 30_000
    drop_model: bool = False
    """Leave out training questions with "model" in the answer, as LAVIS does."""
    synthetic: bool = False
    """Replace 3 of 11 training questions by yes/no ones on captions, as LAVIS does."""


def read(source: SourceFolder, options: Options) -> Contents:
    """Return training and test rows."""
    train_file = source.need("CAP3DQA_final.csv", ORIGIN)
    test_file = source.need("CAP3DQA_final_val.csv", ORIGIN)
    media = point_clouds(source)
    source.require_all()
    dropped: Counter[str] = Counter()
    rows, captions = _rows(test_file, dropped)
    test = draw_rows(full_rows(rows, dropped), options.test_size, options.seed, "cap3dqa/test")
    rows, captions = _rows(train_file, dropped)
    never = {row.key for row in test} | excluded_ids(source, options.exclude)
    train = without(full_rows(rows, dropped), never, dropped)
    if options.drop_model:
        kept = [row for row in train if "model" not in row.text.answers[0].lower()]
        dropped['answer with "model"'] += len(train) - len(kept)
        train = kept
    train = draw_rows(train, options.train_size, options.seed, "cap3dqa/train")
    if options.synthetic:
        train = _with_synthetic(train, captions, options.seed)
    return Contents(train, test, media, options.conversion, dropped)


def _rows(path: Path, dropped: Counter[str]) -> tuple[list[Row], dict[str, str]]:
    """Return the rows of a file, and the caption of every object in it."""
    rows, captions = [], {}
    columns = ("sample_id", "caption", "question", "answer")
    for number, (uid, text, asked, answer) in enumerate(read_csv(path, columns)):
        uid = uid.strip()
        if not UID.fullmatch(uid):
            dropped["row without an object's id"] += 1
        elif uid in DAMAGED:
            dropped["damaged object"] += 1
        else:
            rows.append(object_row(uid, question(number, asked, (answer,))))
            captions[uid] = clean(text)
    return rows, captions


def _with_synthetic(rows: Sequence[Row], captions: dict[str, str], seed: int) -> list[Row]:
    """Ask of 3 in 11 objects whether a caption fits: half the time its own, else another's."""
    keys = [row.key for row in rows]
    changed = []
    for row in rows:
        digest = hashlib.sha256(f"{seed}/cap3dqa/{row.key}#{row.text.id}".encode()).digest()
        drawn = int.from_bytes(digest[:8], "big")
        other = keys[drawn // (4 * SYNTHETIC_OF) % len(keys)]
        if drawn % SYNTHETIC_OF >= SYNTHETIC:
            changed.append(row)
            continue
        fits = drawn // SYNTHETIC_OF % 2 == 0 or captions[other] == captions[row.key]
        asked = captions[row.key if fits else other].rstrip(".")
        text = replace(row.text, question=f"Is this {asked}?", answers=("yes" if fits else "no",))
        changed.append(replace(row, text=text))
    return changed


DATASET = Dataset(
    name="cap3dqa",
    version=1,
    modality="pointcloud",
    licence="not stated for the questions; ODC-By-1.0 (Cap3D)",
    options=Options,
    read=read,
)
