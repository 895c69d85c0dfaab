"""Recipes: how each shard set comes into being. A recipe's module is imported when it is used.

A recipe module has `build(source, out, log) -> folders`: it reads the folder `source` (None if it
needs none), writes `<out>/<dataset>/<split>` with `shards.writer.write_shards`, passes lines for
the user to `log`, and returns the split folders.
"""

import difflib
from collections.abc import Callable
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import TypeAlias, cast

from mera_ds.errors import DataError, InputError
from mera_ds.shards.lint import lint_pair

Log: TypeAlias = Callable[[str], None]
Recipe: TypeAlias = Callable[[Path | None, Path, Log], list[Path]]

RECIPES = {
    "tiny": "mera_ds.recipes.tiny",
    "pocket": "mera_ds.recipes.pocket",
}
"""Name of a recipe -> module with its `build`."""


def load_recipe(name: str) -> Recipe:
    """Return the `build` function of a recipe.

    Raises:
        InputError: there is no such recipe.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"unknown recipe {name!r}; {hint}known are: {', '.join(RECIPES)}")
    return cast(Recipe, import_module(RECIPES[name]).build)


def build(name: str, source: Path | None, out: Path, log: Log) -> list[Path]:
    """Build a recipe's shard sets below `out`, and check that no two splits of one overlap.

    Raises:
        InputError: unknown recipe, or `source` is not a folder.
        DataError: bad source data, or splits of one dataset share a key, concept or medium.
    """
    if source is not None and not source.is_dir():
        raise InputError(f"--source {source} is not a folder")
    folders = load_recipe(name)(source, out, log)
    for first, second in combinations(folders, 2):
        if first.parent == second.parent and (problems := lint_pair(first, second)):
            lines = "\n  ".join(problems[:20])
            raise DataError(f"recipe {name!r}: {first} and {second} overlap:\n  {lines}")
    return folders
