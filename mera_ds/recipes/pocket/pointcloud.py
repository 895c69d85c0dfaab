"""Point clouds of the pocket set: 3D models of Sweet Home 3D, sampled on their surfaces."""

import hashlib
import io
import itertools
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from mera_ds.recipes.pocket.items import Item, Part, captions_of, split_by_concept
from mera_ds.recipes.pocket.mesh import normalise, parse_obj, sample_surface
from mera_ds.recipes.pocket.sources import FURNITURE, read_members

QUESTION = "What kind of thing?"
ANSWERS = ("figure", "plant", "seat", "storage", "table", "vessel")
TEST_SIZE = 115
POINTS = 1024
TRAIN_VIEWS = 2
"""A training model is sampled this many times, turned by 0 and by 90 to 270 degrees."""

LICENCES = {
    "BlendSwap-CC-0": "CC0-1.0",
    "BlendSwap-CC-BY": "CC-BY-3.0",
    "KatorLegaz": "CC-BY-3.0-US",
    "Reallusion": "CC-BY-3.0-US",
    "Scopia": "CC-BY-3.0",
}
"""Catalogue -> licence, as in its LICENSE.TXT."""

KINDS = {
    "figure": "female male boy girl dog cat horse rabbit chicken deer bulldog snowman bear doll",
    "plant": (
        "plant tree ficus bamboo pine palm maple cactus orchids spathiphyllum yucca lily tulips"
        " flowers acacia cypress beech poplar hedge bush blossom"
    ),
    "seat": (
        "chair armchair sofa stool bench couch seat seats puff ottoman lounge bank wheelchair"
    ),
    "storage": (
        "cabinet bookcase shelves wardrobe cupboard drawers dresser chest locker box crate"
        " suitcase fridge refrigerator freezer safe rack oven"
    ),
    "table": "table desk trestles vanity workbench",
    "vessel": (
        "bottle glass cup vase bowl pot mug jar teapot kettle pottery creamer flacon barrel bucket"
    ),
}
"""Class -> words that name a thing of it."""
CLASS_OF = {word: answer for answer, words in KINDS.items() for word in words.split()}
NOT_OF_THEIR_KIND = frozenset(
    ("clothes horse", "hot dog", "plate glass and cutlery", "roasted chicken", "rocking horse")
)

VARIANT_WORDS = frozenset(
    "small large little big high low lower upper corner bended sitting lying down holding a the"
    " with and of in on under mannequin seats painted concept clear modern contemporary".split()
)
"""Words that tell variants of one concept apart."""
TALL, LOW = 1.3, 0.6
"""Height in terms of the larger horizontal extent, above and below which captions say so."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Model:
    """One model of a catalogue."""

    catalogue: str
    id: str
    name: str
    creator: str
    path: str
    rotation: tuple[float, ...]
    """3 x 3, by rows; turns the model so that y is up."""
    concept: str
    answer: str


def build_part(source: Path) -> Part:
    """Return the point clouds of the set, cut from the packages in `source`."""
    archives = _archives(source)
    models = [model for name in archives for model in read_catalogue(name, archives[name])]
    train, test = split_by_concept(models, TEST_SIZE, "pocket/pointcloud")
    return Part(
        modality="pointcloud",
        licence="CC-BY-3.0, CC-BY-3.0-US and CC0-1.0 by catalogue; authors in NOTICE",
        question=QUESTION,
        answers=ANSWERS,
        train=tuple(
            _item(model, archives[model.catalogue], view)
            for model in train
            for view in range(TRAIN_VIEWS)
        ),
        test=tuple(_item(model, archives[model.catalogue], 0) for model in test),
        method=(
            f"{POINTS} points, uniform over the surface, float16 (N, 3), y up, in the unit sphere"
        ),
        packages=(FURNITURE,),
        credits=tuple(_credits([*train, *test])),
    )


def _archives(source: Path) -> dict[str, zipfile.ZipFile]:
    files = read_members(source, FURNITURE, lambda path: path.endswith(".sh3f"))
    return {
        PurePosixPath(path).stem: zipfile.ZipFile(io.BytesIO(content))
        for path, content in sorted(files.items())
    }


def read_catalogue(catalogue: str, archive: zipfile.ZipFile) -> Iterator[Model]:
    """Yield the models of a catalogue that belong to one of the classes."""
    properties = _properties(archive.read("PluginFurnitureCatalog.properties").decode("latin-1"))
    number = 1
    while f"id#{number}" in properties:
        entry = {
            key: properties.get(f"{key}#{number}", "")
            for key in ("id", "name", "model", "modelRotation", "creator")
        }
        number += 1
        name = " ".join(re.findall(r"[a-z]+", entry["name"].lower()))
        answer = _class_of(name)
        if answer is None:
            continue
        yield Model(
            catalogue=catalogue,
            id=entry["id"].split("#", 1)[1],
            name=name,
            creator=entry["creator"],
            path=entry["model"].lstrip("/"),
            rotation=tuple(float(value) for value in entry["modelRotation"].split()),
            concept=_concept(name),
            answer=answer,
        )


def _properties(text: str) -> Mapping[str, str]:
    """Read a Java properties file (without line continuations)."""
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
    lines = (line.split("=", 1) for line in text.splitlines() if "=" in line and line[0] != "#")
    return {key.strip(): value.strip() for key, value in lines}


def _class_of(name: str) -> str | None:
    """Return the class of the word that names the thing ("glass" in "beer glass"), or None."""
    head = re.split(" (?:with|on|under|and|of) ", name)[0].split()[-1:]
    return CLASS_OF.get(head[0]) if head and name not in NOT_OF_THEIR_KIND else None


def _concept(name: str) -> str:
    words = [word for word in name.split() if word not in VARIANT_WORDS]
    return " ".join(words) or name


def _item(model: Model, archive: zipfile.ZipFile, view: int) -> Item:
    key = re.sub(r"[^a-z0-9]+", "-", f"{model.catalogue}-{model.id}".lower()).strip("-")
    seed = hashlib.sha256(f"pocket/{key}/{view}".encode()).digest()
    rng = np.random.default_rng(list(seed))
    triangles = parse_obj(archive.read(model.path).decode("latin-1"))
    points = sample_surface(triangles, POINTS, rng)
    if model.rotation:
        points = points @ np.array(model.rotation).reshape(3, 3).T
    points = normalise(points)
    phrase = f"a {_shape(points)} {model.answer}".replace("  ", " ")
    target = io.BytesIO()
    np.save(target, _turned(points, view, rng).astype(np.float16), allow_pickle=False)
    return Item(
        key=f"{key}-{view}" if view else key,
        extension="npy",
        media=target.getvalue(),
        concept=model.concept,
        source=f"{FURNITURE.name}/{model.catalogue}.sh3f/{model.path} ({model.creator})",
        answer=model.answer,
        captions=captions_of(model.name, phrase),
    )


def _credits(models: Sequence[Model]) -> Iterator[str]:
    """Yield the models by catalogue and author, as the catalogues name them."""
    ordered = sorted(models, key=lambda model: (model.catalogue, model.creator, model.id))
    for catalogue, members in itertools.groupby(ordered, lambda model: model.catalogue):
        yield f"{catalogue} ({LICENCES[catalogue]})"
        for creator, works in itertools.groupby(members, lambda model: model.creator):
            yield f"  {creator}: {', '.join(work.id for work in works)}"


def _shape(points: Floats) -> str:
    width, height, depth = np.ptp(points, axis=0)
    ratio = height / max(width, depth)
    return "tall" if ratio > TALL else "low" if ratio < LOW else "medium"


def _turned(points: Floats, view: int, rng: np.random.Generator) -> Floats:
    """Turn a further view about the upright axis by one to three right angles."""
    for _ in range(int(rng.integers(1, 4)) if view else 0):
        points = points[:, [2, 1, 0]] * np.array([1, 1, -1])
    return points
