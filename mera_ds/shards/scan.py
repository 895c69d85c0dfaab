"""Reading one large JSON object piece by piece, so that its long list is never whole in memory."""

import json
import re
from collections.abc import Callable
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def scan_object(text: str, name: str, convert: Callable[[Any, int], Any]) -> Any:
    """Return a JSON text's value; if it is an object, the items of its list `name` are converted.

    Args:
        text: the JSON text.
        name: the key whose list is long.
        convert: called with each item of it and its number; the results stand in its place.

    Raises:
        ValueError: the text is not valid JSON, or a key comes twice.
    """
    position = _skip(text, 0)
    if text[position : position + 1] != "{":
        return json.loads(text)
    found: dict[str, Any] = {}
    position = _skip(text, position + 1)
    while text[position : position + 1] != "}":
        if found:
            position = _expect(text, position, ",")
        key, position = _value(text, position)
        if not isinstance(key, str) or key in found:
            raise json.JSONDecodeError(f"the key {key!r} is no text or comes twice", text, position)
        position = _expect(text, position, ":")
        if key == name and text[position : position + 1] == "[":
            found[key], position = _list(text, position, convert)
        else:
            found[key], position = _value(text, position)
    if _skip(text, position + 1) != len(text):
        raise json.JSONDecodeError("text behind the object", text, position + 1)
    return found


def _list(text: str, position: int, convert: Callable[[Any, int], Any]) -> tuple[list[Any], int]:
    items: list[Any] = []
    position = _skip(text, position + 1)
    while text[position : position + 1] != "]":
        if items:
            position = _expect(text, position, ",")
        value, position = _value(text, position)
        items.append(convert(value, len(items)))
    return items, _skip(text, position + 1)


def _value(text: str, position: int) -> tuple[Any, int]:
    value, position = _DECODER.raw_decode(text, position)
    return value, _skip(text, position)


def _expect(text: str, position: int, sign: str) -> int:
    if text[position : position + 1] != sign:
        raise json.JSONDecodeError(f"expected {sign!r}", text, position)
    return _skip(text, position + 1)


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()
