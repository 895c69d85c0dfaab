"""Kinds from a user's own file: loading plugins, and knowing which file defined which kind.

A plugin is one Python file, named under `plugins` in a profile or a modality's file, that registers
encoders, connectors and decoders (see `mera_ds.plugin`). It is executed once per process, from the
bytes that were hashed; products and features made with its kinds depend on that hash. A run works
with its own copy, in `<run>/plugins`.
"""

import hashlib
import importlib.abc
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mera_ds.config import RunConfig, resolve_path
from mera_ds.errors import InputError, MeraError
from mera_ds.files import write_bytes

ENCODER, CONNECTOR, DECODER = "encoder kind", "connector kind", "media kind"

Kind = tuple[str, str]
"""What it is (`ENCODER`, …) and its name."""


@dataclass(frozen=True)
class Plugin:
    """A loaded plugin."""

    path: Path
    content: bytes
    sha256: str


@dataclass(frozen=True)
class _Entry:
    """A registered kind: who defined it, where it stands, and which kinds it builds on."""

    plugin: Plugin
    table: MutableMapping[str, Any]
    needs: tuple[Kind, ...]


_entries: dict[Kind, _Entry] = {}
_loaded: dict[str, Plugin] = {}
_loading: list[Plugin] = []


def register(
    what: str,
    table: MutableMapping[str, Any],
    kind: str,
    value: Any,
    needs: Sequence[Kind] = (),
) -> None:
    """Enter a plugin's kind into a table of kinds.

    Raises:
        InputError: if the name is taken, or no plugin is being loaded.
    """
    if not _loading:
        raise InputError(
            f"{what} '{kind}' can only be registered by a plugin, so that runs know its file; "
            "name the file under 'plugins'"
        )
    if kind in table:
        entry = _entries.get((what, kind))
        owner = f"that of {entry.plugin.path}" if entry else "one of mera-ds itself"
        raise InputError(f"the {what} '{kind}' is {owner} already; choose another name")
    table[kind] = value
    _entries[what, kind] = _Entry(_loading[-1], table, tuple(needs))


def load_plugin(path: Path) -> Plugin:
    """Execute a plugin, unless a file of the same content was executed before.

    Raises:
        InputError: if it is missing, broken (naming the line), or registers nothing.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"the plugin {path} can't be read: {error.strerror}") from None
    plugin = Plugin(path, content, hashlib.sha256(content).hexdigest())
    if plugin.sha256 in _loaded:
        return plugin
    _loading.append(plugin)
    try:
        with plugin_errors(f"the plugin {path} can't be loaded"):
            _execute(plugin)
        if not any(entry.plugin == plugin for entry in _entries.values()):
            raise InputError(
                f"the plugin {path} registers nothing; call register_encoder, register_connector "
                "or register_decoder (see mera_ds.plugin)"
            )
    except MeraError:
        _forget(plugin)
        raise
    finally:
        _loading.remove(plugin)
    _loaded[plugin.sha256] = plugin
    return plugin


class _Loader(importlib.abc.SourceLoader):
    """Executes bytes that were read already; Python's own might take an older compiled file."""

    def __init__(self, plugin: Plugin) -> None:
        self._plugin = plugin

    def get_filename(self, fullname: str) -> str:
        return str(self._plugin.path)

    def get_data(self, path: str) -> bytes:  # type: ignore[override]
        return self._plugin.content


def _module_name(plugin: Plugin) -> str:
    stem = re.sub(r"\W", "_", plugin.path.stem)
    return f"mera_plugin_{stem}_{plugin.sha256[:12]}"


def _execute(plugin: Plugin) -> None:
    name = _module_name(plugin)
    spec = importlib.util.spec_from_loader(name, _Loader(plugin))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up the types of their fields there
    spec.loader.exec_module(module)


def _forget(plugin: Plugin) -> None:
    sys.modules.pop(_module_name(plugin), None)
    for (what, kind), entry in list(_entries.items()):
        if entry.plugin == plugin:
            del entry.table[kind], _entries[what, kind]


@contextmanager
def plugin_errors(what: str) -> Iterator[None]:
    """Turn an error that a plugin's code raises into an `InputError` with file and line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        line = _line(error)
        if line is None and isinstance(error, MeraError):
            raise
        place = "" if line is None else f" ({line})"
        name = "" if isinstance(error, MeraError) else f"{type(error).__name__}: "
        message = error.msg if isinstance(error, SyntaxError) else error
        raise InputError(f"{what}{place}: {name}{message}") from error


def _line(error: BaseException) -> str | None:
    """Return the last line of a plugin's file in an error's traceback."""
    files = {str(plugin.path) for plugin in (*_loading, *_loaded.values())}
    if isinstance(error, SyntaxError) and error.filename in files:
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [
        f"{frame.filename}, line {frame.lineno}" for frame in frames if frame.filename in files
    ]
    return lines[-1] if lines else None


def defining_plugins(kinds: Iterable[Kind]) -> dict[str, str]:
    """Return the plugins that define some kinds, or what those build on: file name -> SHA-256."""
    found: dict[str, str] = {}
    for kind in kinds:
        if kind in _entries:
            entry = _entries[kind]
            found[entry.plugin.path.name] = entry.plugin.sha256
            found |= defining_plugins(entry.needs)
    return dict(sorted(found.items()))


def load_plugins(config: RunConfig, run: Path) -> None:
    """Load the plugins of a run."""
    for text in config.plugins:
        load_plugin(resolve_path(text, run))


def find_plugins(texts: Sequence[str], base: Path, run: Path) -> list[Plugin]:
    """Load the plugins that a file names; relative paths start from the folder `base`."""
    return [load_plugin(base / resolve_path(text, run)) for text in texts]


def keep_plugins(
    plugins: Sequence[Plugin], run: Path, known: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return how a run's configuration names its plugins: `known` and the copies of some more.

    Raises:
        InputError: if the run has another plugin of that name.
    """
    named = list(known)
    for plugin in plugins:
        text = f"{{run}}/plugins/{plugin.path.name}"
        path = resolve_path(text, run)
        if text not in named:
            named.append(text)
        elif not path.exists() or path.read_bytes() != plugin.content:
            raise InputError(f"{path} is another plugin than {plugin.path}; rename one of them")
    return tuple(named)


def copy_plugins(plugins: Sequence[Plugin], run: Path) -> None:
    """Write a run's copies of some plugins."""
    for plugin in plugins:
        write_bytes(run / "plugins" / plugin.path.name, plugin.content)
