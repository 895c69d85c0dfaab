"""Strict settings: YAML and overrides in, frozen dataclasses out, and back. Imports no torch."""

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from mera_ds.errors import InputError

T = TypeVar("T")


def require_known(name: str, known: typing.Iterable[str], what: str) -> None:
    """Raise `InputError` with the nearest valid name unless `name` is one of `known`."""
    names = list(known)
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"valid: {', '.join(sorted(names))}"
    raise InputError(f"{what} '{name}' is unknown; {hint}")


def parse(cls: type[T], value: Mapping[str, Any], where: str) -> T:
    """Build a frozen dataclass from a mapping, strictly.

    Args:
        cls: the dataclass.
        value: names and values, as YAML gives them.
        where: what to call the mapping in messages, e.g. the file or the dotted key.

    Raises:
        InputError: on an unknown name (with the nearest valid one), a missing one, or a value of
            the wrong type.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: expected a mapping, got {value!r}")
    fields = {entry.name: entry for entry in dataclasses.fields(typing.cast(Any, cls))}
    for name in value:
        require_known(str(name), fields, f"{where}: key")
    types_of = typing.get_type_hints(cls)
    missing = [
        name
        for name, entry in fields.items()
        if name not in value and entry.default is entry.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{where}: missing key '{missing[0]}'; add it")
    arguments = {
        name: _convert(item, types_of[name], f"{where}.{name}") for name, item in value.items()
    }
    try:
        return cls(**arguments)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _convert(value: Any, kind: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _convert_to_any(value, typing.get_args(kind), where)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value in choices and type(value) in {type(choice) for choice in choices}:
            return value
        raise InputError(f"{where} is {value!r}; valid: {', '.join(map(str, choices))}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where} is {value!r}; expected a list")
        item = typing.get_args(kind)[0]
        return tuple(_convert(entry, item, f"{where}[{i}]") for i, entry in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return parse(typing.cast(type, kind), value, where)
    if origin is not None and issubclass(origin, Mapping):
        return _convert_mapping(value, typing.get_args(kind)[1], where)
    return _convert_scalar(value, kind, where)


def _convert_to_any(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    """Convert to the first of some kinds that takes the value."""
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    if len(others) == 1:
        return _convert(value, others[0], where)
    for kind in others:
        with contextlib.suppress(InputError):
            return _convert(value, kind, where)
    choices = [typing.get_args(kind) or (kind.__name__,) for kind in others]
    valid = ", ".join(str(choice) for entry in choices for choice in entry)
    raise InputError(f"{where} is {value!r}; valid: {valid}")


def _convert_mapping(value: Any, item: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} is {value!r}; expected a mapping")
    return {str(key): _convert(entry, item, f"{where}.{key}") for key, entry in value.items()}


def _convert_scalar(value: Any, kind: Any, where: str) -> Any:
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is Any or type(value) is kind:
        return value
    raise InputError(f"{where} is {value!r}; expected {kind.__name__}")


def dump(config: Any) -> dict[str, Any]:
    """Return a dataclass as plain data: the inverse of `parse`."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader; a broken file is an `InputError`."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a mapping of settings")
    return value


class _Loader(yaml.SafeLoader):
    """The safe loader, reading `2e-5` as a number as every YAML 1.2 reader does."""


_FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def merge_settings(
    base: Mapping[str, Any], changes: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return `base` with the values of `changes` put in, section by section; lists are replaced.

    Raises:
        InputError: if one of them holds a section where the other has a plain value.
    """
    result: dict[str, Any] = _plain(base)
    for name, value in changes.items():
        if name in result and isinstance(value, Mapping) != isinstance(result[name], Mapping):
            raise InputError(f"{where}.{name} is {value!r}; its base has {result[name]!r}")
        if name in result and isinstance(value, Mapping):
            result[name] = merge_settings(result[name], value, f"{where}.{name}")
        else:
            result[name] = _plain(value)
    return result


def apply_overrides(values: Mapping[str, Any], overrides: typing.Sequence[str]) -> dict[str, Any]:
    """Return `values` with dotted `section.key=value` overrides; values are read as YAML."""
    result: dict[str, Any] = _plain(values)
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals:
            raise InputError(f"override '{text}' must look like section.key=value")
        *sections, last = key.split(".")
        target = result
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise InputError(f"override '{text}': {section} is not a section")
        try:
            target[last] = yaml.load(raw, Loader=_Loader)
        except yaml.YAMLError:  # a text, such as `{run}/weights`; its type is checked later
            target[last] = raw
    return result


def require_ranges(
    section: Any,
    where: str,
    ranges: Mapping[str, tuple[float, float]],
    from_zero: Collection[str],
) -> None:
    """Raise `InputError` naming a number that is out of its range.

    Args:
        section: a dataclass of settings.
        where: its name.
        ranges: the least and the largest value by setting; other whole numbers begin at 1.
        from_zero: whole numbers that begin at 0.
    """
    for name, value in vars(section).items():
        low, high = ranges.get(name, (-math.inf, math.inf))
        if type(value) is int and name not in ranges:
            low = 0.0 if name in from_zero else 1.0
        if isinstance(value, int | float) and not low <= value <= high:
            wanted = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
            raise InputError(f"{where}.{name} is {value}; it must be {wanted}")
