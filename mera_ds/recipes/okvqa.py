"""Recipe `okvqa`: OK-VQA (Marino et al. 2019), paper Appendix A.

Training: one sample for each distinct answer of a question, which gives the paper's 26K. Test:
questions on val2014 images; the answer to judge by is the most frequent one, and all are kept.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mera_ds.errors import DataError
from mera_ds.recipes.coco import image_row, images
from mera_ds.recipes.official.contents import (
    CommonOptions,
    Contents,
    Dataset,
    Row,
    clean,
    draw_rows,
    full_rows,
    question,
)
from mera_ds.recipes.official.convert import Conversion
from mera_ds.recipes.official.sources import SourceFolder, read_json, records

ORIGIN = "okvqa.allenai.org/download.html, unpacked"


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Options of `okvqa`."""

    answers: Literal["answer", "raw_answer"] = "answer"
    """Which form of an answer: the normalised one or as it was written."""
    train_answers: Literal["distinct", "most-frequent"] = "distinct"
    """One training sample for each distinct answer of a question, or one a question."""


def read(source: SourceFolder, options: Options) -> Contents:
    """Return training and test rows."""
    files = {
        split: (
            source.need(f"OpenEnded_mscoco_{split}2014_questions.json", ORIGIN),
            source.need(f"mscoco_{split}2014_annotations.json", ORIGIN),
        )
        for split in ("train", "val")
    }
    media = images(source)
    source.require_all()
    dropped: Counter[str] = Counter()
    train: list[Row] = []
    test: list[Row] = []
    for image_id, number, text, answers in _questions(*files["train"], options.answers):
        used = answers if options.train_answers == "distinct" else answers[:1]
        for rank, answer in enumerate(used):
            told = question(f"{number}-{rank}", text, (answer,))
            train.append(image_row(image_id, "train2014", told))
    for image_id, number, text, answers in _questions(*files["val"], options.answers):
        test.append(image_row(image_id, "val2014", question(number, text, answers)))
    return Contents(
        full_rows(train, dropped),
        draw_rows(full_rows(test, dropped), options.test_size, options.seed, "okvqa/test"),
        media,
        Conversion("image"),
        dropped,
    )


def _questions(
    questions: Path, annotations: Path, form: str
) -> Iterator[tuple[int, int, str, list[str]]]:
    """Yield image, number and text of every question, and its distinct answers.

    The most frequent answer comes first, equally frequent ones in their order in the file.
    """
    found = records(
        read_json(annotations), "annotations", annotations, question_id=int, answers=list
    )
    answers: dict[int, list[str]] = {}
    for number, given in found:
        texts = [clean(text) for (text,) in records(given, None, annotations, **{form: str})]
        answers[number] = [text for text, _ in Counter(filter(None, texts)).most_common()]
    asked = records(
        read_json(questions), "questions", questions, image_id=int, question_id=int, question=str
    )
    for image_id, number, text in asked:
        if number not in answers:
            raise DataError(f"{annotations} has no answers to the question {number}")
        yield image_id, number, text, answers[number]


DATASET = Dataset(
    name="okvqa",
    version=1,
    modality="image",
    licence="CC-BY-4.0 (annotations; the images have Flickr's terms)",
    options=Options,
    read=read,
)
