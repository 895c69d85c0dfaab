"""Names and value checks of the JSON files of a shard folder; what is wrong is a `DataError`."""

from typing import Any

from mera_ds.errors import DataError

INDEX_NAME = "index.json"
REBUILD = "rebuild the folder with `mera-ds shards build`, or copy it again"


def require_fields(value: Any, names: tuple[str, ...], where: str) -> dict[str, Any]:
    """Return an object that has just these keys."""
    fields = as_mapping(value, where)
    if fields.keys() == set(names):
        return fields
    missing = [name for name in names if name not in fields]
    unknown = [name for name in fields if name not in names]
    raise DataError(
        f"{where}: missing keys {missing}, unknown keys {unknown}; {REBUILD} (or use the version "
        "of mera-ds that wrote it)"
    )


def as_mapping(value: Any, where: str) -> dict[str, Any]:
    """Return an object."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, found {value!r:.60}; {REBUILD}")
    return value


def as_list(value: Any, where: str, length: int | None = None) -> list[Any]:
    """Return a list, of this length if one is given."""
    if not isinstance(value, list) or (length is not None and len(value) != length):
        wanted = "a list" if length is None else f"a list of {length}"
        raise DataError(f"{where}: expected {wanted}, found {value!r:.60}; {REBUILD}")
    return value


def as_text(value: Any, where: str) -> str:
    """Return a string that UTF-8 can hold."""
    if not isinstance(value, str):
        raise DataError(f"{where}: expected a string, found {value!r:.60}; {REBUILD}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: {value!r:.60} is no text; {REBUILD}") from None
    return value


def as_integer(value: Any, where: str) -> int:
    """Return a whole number in [0, 2^63)."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise DataError(f"{where}: expected a whole number >= 0, found {value!r:.60}; {REBUILD}")
    return value
