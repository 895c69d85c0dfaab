"""The English names of emoji, from emojibase-data: label, group and subgroup by code points."""

import json
from dataclasses import dataclass
from pathlib import Path

from mera_ds.recipes.pocket.sources import EMOJIBASE, read_members


@dataclass(frozen=True)
class EmojiName:
    """What an emoji is called."""

    label: str
    """In lower case, without colons, and without the skin tone."""
    subgroup: str
    """Such as `person-sport`; empty if the emoji belongs to none."""
    skin_tone: bool
    """Whether this is a variant of another emoji that differs in skin tone only."""


class EmojiNames:
    """The names of all emoji.

    Packages disagree on where to write the variation selector `fe0f`, so it is ignored.
    """

    def __init__(self, source: Path) -> None:
        files = read_members(
            source, EMOJIBASE, lambda path: path in ("en/data.json", "en/messages.json")
        )
        messages = json.loads(files["en/messages.json"])
        subgroups = {entry["order"]: entry["key"] for entry in messages["subgroups"]}
        self._names: dict[str, EmojiName] = {}
        for entry in json.loads(files["en/data.json"]):
            label = entry["label"].lower().replace("’", "'").replace(":", "")
            subgroup = subgroups.get(entry.get("subgroup"), "")
            self._names[_plain(entry["hexcode"])] = EmojiName(label, subgroup, False)
            for skin in entry.get("skins", []):
                self._names[_plain(skin["hexcode"])] = EmojiName(label, subgroup, True)

    def find(self, code_points: str) -> EmojiName | None:
        """Return the name of an emoji given like "1f3cc-fe0f-200d-2642-fe0f"."""
        return self._names.get(_plain(code_points))


def _plain(code_points: str) -> str:
    return code_points.lower().replace("-fe0f", "")
