"""Recipe `coco`: MSCOCO-2014 captions (Lin et al. 2014), paper Appendix A.

Training: the first caption of each train2014 image. Test: images of the holdout with all their
captions.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mera_ds.errors import DataError
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
from mera_ds.recipes.official.sources import MediaFiles, SourceFolder, read_json, records

ANNOTATIONS = "in annotations_trainval2014.zip of cocodataset.org/#download"
IMAGES = "train2014.zip and val2014.zip of cocodataset.org/#download, unpacked or not"
KARPATHY_FILES = ("dataset_coco.json", "coco_karpathy_test.json")


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Options of `coco`."""

    train_captions: Literal["first", "all"] = "first"
    """`first`: of each image the caption with the lowest annotation id."""
    holdout: Literal["auto", "karpathy", "val2014"] = "auto"
    """`auto`: Karpathy's test images if his file is there, all of val2014 otherwise."""


def read(source: SourceFolder, options: Options) -> Contents:
    """Return training and test rows."""
    train_file = source.need("captions_train2014.json", ANNOTATIONS)
    karpathy = next((f for name in KARPATHY_FILES if (f := source.find(name))), None)
    if options.holdout == "karpathy" and karpathy is None:
        source.need_one_of(KARPATHY_FILES, "caption_datasets.zip of Karpathy & Fei-Fei 2015")
    if options.holdout == "val2014":
        karpathy = None
    if karpathy is None:
        test_file = source.need("captions_val2014.json", ANNOTATIONS)
    media = images(source)
    source.require_all()
    train = list(_coco_rows(read_json(train_file), train_file, "train2014"))
    if options.train_captions == "first":
        train = list({row.key: row for row in reversed(train)}.values())[::-1]
    if karpathy is not None:
        test = list(_karpathy_rows(read_json(karpathy), karpathy))
    else:
        test = list(_coco_rows(read_json(test_file), test_file, "val2014"))
    dropped: Counter[str] = Counter()
    train, test = full_rows(train, dropped), full_rows(test, dropped)
    return Contents(
        train,
        draw_media(test, options.test_size, options.seed, "coco/test"),
        media,
        Conversion("image"),
        dropped,
    )


def images(source: SourceFolder) -> MediaFiles:
    """Return the images of train2014 and val2014."""
    folders = ("train2014", "val2014", "images/train2014", "images/val2014")
    return source.media(folders, ("train2014.zip", "val2014.zip"), IMAGES)


def image_row(image_id: int, folder: str, text: Any) -> Row:
    """Return a row on an image of `train2014` or `val2014`."""
    name = f"COCO_{folder}_{image_id:012d}.jpg"
    return Row(f"{image_id:012d}", f"{folder}/{name}", (name,), text)


def _coco_rows(content: Any, path: Path, folder: str) -> Iterator[Row]:
    """Yield all captions, images by id and their captions by annotation id."""
    found = records(content, "annotations", path, image_id=int, id=int, caption=str)
    for image_id, number, text in sorted(found):
        yield image_row(image_id, folder, caption(number, text))


def _karpathy_rows(content: Any, path: Path) -> Iterator[Row]:
    """Yield the captions of the test images of either of `KARPATHY_FILES`."""
    if path.name == KARPATHY_FILES[1]:
        for name, texts in records(content, None, path, image=str, caption=list):
            image_id = _image_id(name, path)
            for number, text in enumerate(texts):
                if not isinstance(text, str):
                    raise DataError(f"{path}: {name} has the caption {text!r:.60}, no text")
                yield image_row(image_id, "val2014", caption(number, text))
        return
    found = records(content, "images", path, cocoid=int, split=str, sentences=list)
    for image_id, split, sentences in found:
        if split == "test":
            for text, number in records(sentences, None, path, raw=str, sentid=int):
                yield image_row(image_id, "val2014", caption(number, text))


def _image_id(name: str, path: Path) -> int:
    number = Path(name).stem.rpartition("_")[2]
    if not (number.isascii() and number.isdigit()):
        raise DataError(f"{path}: '{name:.60}' is no name of a COCO image; fetch the file again")
    return int(number)


DATASET = Dataset(
    name="coco",
    version=1,
    modality="image",
    licence="CC-BY-4.0 (annotations; the images have Flickr's terms)",
    options=Options,
    read=read,
)
