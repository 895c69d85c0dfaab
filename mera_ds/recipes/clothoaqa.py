"""Recipe `clothoaqa`: Clotho-AQA (Lipping et al. 2022), paper Appendix A.

Every answer of an annotator who was sure of it (confidence "yes") is one sample, in lower case.
"""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mera_ds.recipes.official.contents import (
    CommonOptions,
    Contents,
    Dataset,
    Row,
    draw_rows,
    full_rows,
    question,
)
from mera_ds.recipes.official.convert import Conversion
from mera_ds.recipes.official.sources import SourceFolder, read_csv

ORIGIN = "zenodo.org/records/6473207"


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Options of `clothoaqa`."""

    confidence: Literal["yes", "any"] = "yes"
    """`yes`: only answers whose annotator was sure; `any`: all."""


def read(source: SourceFolder, options: Options) -> Contents:
    """Return training and test rows."""
    train_file = source.need("clotho_aqa_train.csv", ORIGIN)
    test_file = source.need("clotho_aqa_test.csv", ORIGIN)
    media = source.media(("audio_files",), ("audio_files.zip",), ORIGIN, loose=("wav",))
    source.require_all()
    dropped: Counter[str] = Counter()
    train = full_rows(_rows(train_file, options, dropped), dropped)
    test = full_rows(_rows(test_file, options, dropped), dropped)
    return Contents(
        train,
        draw_rows(test, options.test_size, options.seed, "clothoaqa/test"),
        media,
        Conversion("audio"),
        dropped,
    )


def _rows(path: Path, options: Options, dropped: Counter[str]) -> list[Row]:
    rows = []
    columns = ("file_name", "QuestionText", "answer", "confidence")
    for number, (name, text, answer, confidence) in enumerate(read_csv(path, columns)):
        if options.confidence == "yes" and confidence.strip().lower() != "yes":
            dropped["confidence not yes"] += 1
            continue
        file = name.strip()
        told = question(number, text, (answer.lower(),))
        rows.append(Row(key_of(file), file, (file,), told))
    return rows


def key_of(name: str) -> str:
    """Return a key for a file name of any characters: readable, and unique by a hash."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", Path(name).stem).strip("-")[:60]
    return f"{readable or 'sound'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


DATASET = Dataset(
    name="clothoaqa",
    version=1,
    modality="audio",
    licence="MIT (as the paper states; the record at Zenodo has a licence file of its own)",
    options=Options,
    read=read,
)
