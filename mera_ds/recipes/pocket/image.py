"""Images of the pocket set: Noto emoji drawings of things, without people, faces and signs."""

import json
from dataclasses import dataclass
from pathlib import Path

from mera_ds.recipes.pocket.emoji import EmojiNames
from mera_ds.recipes.pocket.items import Item, Part, captions_of, head_word, split_by_concept
from mera_ds.recipes.pocket.sources import EMOJIBASE, NOTO, read_member, read_members

QUESTION = "What is shown?"
ANSWERS = ("animal", "clothing", "food", "object", "place", "vehicle")
TEST_SIZE = 115

KINDS = {
    "animal-amphibian": ("animal", "an amphibian"),
    "animal-bird": ("animal", "a bird"),
    "animal-bug": ("animal", "a bug"),
    "animal-mammal": ("animal", "a mammal"),
    "animal-marine": ("animal", "a sea animal"),
    "animal-reptile": ("animal", "a reptile"),
    "clothing": ("clothing", "something to wear"),
    "drink": ("food", "a drink"),
    "food-asian": ("food", "an asian dish"),
    "food-fruit": ("food", "a fruit"),
    "food-prepared": ("food", "a dish"),
    "food-sweet": ("food", "a sweet dish"),
    "food-vegetable": ("food", "a vegetable"),
    "book-paper": ("object", "a paper item"),
    "computer": ("object", "an electric device"),
    "household": ("object", "a household item"),
    "light & video": ("object", "an electric device"),
    "lock": ("object", "a household item"),
    "mail": ("object", "a paper item"),
    "medical": ("object", "a medical tool"),
    "money": ("object", "an office item"),
    "musical-instrument": ("object", "a musical instrument"),
    "office": ("object", "an office item"),
    "phone": ("object", "an electric device"),
    "science": ("object", "a tool"),
    "sound": ("object", "a sound device"),
    "tool": ("object", "a tool"),
    "writing": ("object", "an office item"),
    "place-building": ("place", "a building"),
    "place-geographic": ("place", "a landscape"),
    "place-other": ("place", "a sight"),
    "place-religious": ("place", "a building"),
    "transport-air": ("vehicle", "an air vehicle"),
    "transport-ground": ("vehicle", "a land vehicle"),
    "transport-water": ("vehicle", "a water vehicle"),
}
"""Subcategory of the source -> class, and phrase of the caption; others are left out."""

NOT_OF_ITS_KIND = frozenset(
    "feather|paw prints|pig nose|coral|spider web|nest|anchor|bus stop|construction|fuel pump"
    "|horizontal traffic light|vertical traffic light|motorway|oil drum|police car light"
    "|railway track|ring buoy|seat|stop sign|wheel|hot springs|foggy|barber pole|rock|brick|wood"
    "|wing|microbe|station|wedding|dna|x-ray|bubbles|drop of blood".split("|")
)
"""Labels whose subcategory does not say what is drawn."""

VARIANT_WORDS = frozenset(
    "face red orange yellow green blue brown purple black white front facing baby oncoming"
    " open closed left right speaking three two one".split()
)


@dataclass(frozen=True)
class _Drawing:
    file: str
    label: str
    concept: str
    answer: str
    phrase: str


def build_part(source: Path) -> Part:
    """Return the images of the set, cut from the packages in `source`."""
    drawings = _drawings(source)
    train, test = split_by_concept(drawings, TEST_SIZE, "pocket/image")
    files = {f"img/google/64/{drawing.file}" for drawing in drawings}
    content = read_members(source, NOTO, files.__contains__)
    return Part(
        modality="image",
        licence="Apache-2.0 (Noto Emoji, Google); names MIT (emojibase-data)",
        question=QUESTION,
        answers=ANSWERS,
        train=tuple(_item(drawing, content) for drawing in train),
        test=tuple(_item(drawing, content) for drawing in test),
        method="64 px PNG files, byte for byte as in the source",
        packages=(NOTO, EMOJIBASE),
    )


def _drawings(source: Path) -> list[_Drawing]:
    names = EmojiNames(source)
    drawings = []
    for entry in json.loads(read_member(source, NOTO, "emoji.json")):
        name = names.find(entry["unified"])
        kind = KINDS.get(entry["subcategory"])
        if name is None or kind is None or not entry["has_img_google"]:
            continue
        if name.label in NOT_OF_ITS_KIND:
            continue
        concept = head_word(name.label, VARIANT_WORDS)
        drawings.append(_Drawing(entry["image"], name.label, concept, *kind))
    return sorted(drawings, key=lambda drawing: drawing.file)


def _item(drawing: _Drawing, content: dict[str, bytes]) -> Item:
    return Item(
        key=drawing.file.removesuffix(".png"),
        extension="png",
        media=content[f"img/google/64/{drawing.file}"],
        concept=drawing.concept,
        source=f"{NOTO.name}/img/google/64/{drawing.file}",
        answer=drawing.answer,
        captions=captions_of(drawing.label, drawing.phrase),
    )
