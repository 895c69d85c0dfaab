"""Recipes: how each shard set comes into being. A recipe's module is imported when it is used.

A recipe's module has `build(source, out, log) -> folders`: it reads the folder `source` (None if
it needs none), writes `<out>/<dataset>/<split>` with `shards.writer.write_shards`, passes lines
for the user to `log`, and returns the split folders. Or it describes a published dataset: then it
has a `DATASET` (`official.contents.Dataset`), with options of its own.
"""

import difflib
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

from mera_ds.errors import DataError, InputError
from mera_ds.settings import apply_overrides, parse
from mera_ds.shards.lint import lint_pair

Log: TypeAlias = Callable[[str], None]

RECIPES = {
    "tiny": "mera_ds.recipes.tiny",
    "pocket": "mera_ds.recipes.pocket",
    "coco": "mera_ds.recipes.coco",
    "okvqa": "mera_ds.recipes.okvqa",
    "msvd": "mera_ds.recipes.msvd",
    "msvdqa": "mera_ds.recipes.msvdqa",
    "audiocaps": "mera_ds.recipes.audiocaps",
    "clothoaqa": "mera_ds.recipes.clothoaqa",
    "cap3d": "mera_ds.recipes.cap3d",
    "cap3dqa": "mera_ds.recipes.cap3dqa",
}
"""Name of a recipe -> its module."""


def load_recipe(name: str) -> ModuleType:
    """Return the module of a recipe.

    Raises:
        InputError: there is no such recipe.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"unknown recipe {name!r}; {hint}known are: {', '.join(RECIPES)}")
    return import_module(RECIPES[name])


def build(
    name: str,
    source: Path | None,
    out: Path,
    log: Log,
    overrides: Sequence[str] = (),
    workers: int = 0,
) -> list[Path]:
    """Build a recipe's shard sets below `out`; no two splits of one dataset overlap afterwards.

    Args:
        name: a name in `RECIPES`.
        source: the dataset's own files.
        out: for `<dataset>/<split>`.
        log: takes lines for the user.
        overrides: `key=value` for options of a published dataset.
        workers: processes that check its media; 0: this one.

    Raises:
        InputError: unknown recipe or option, or `source` lacks something.
        DataError: bad source data, or splits of one dataset share a key, concept or medium.
    """
    if source is not None and not source.is_dir():
        raise InputError(f"--source {source} is not a folder")
    if workers < 0:
        raise InputError(f"--workers {workers} must be at least 0")
    module = load_recipe(name)
    if dataset := getattr(module, "DATASET", None):
        options = parse(dataset.options, apply_overrides({}, overrides), f"recipe {name}")
        from mera_ds.recipes.official.build import build_dataset  # it imports this module

        return build_dataset(dataset, source, out, log, options, workers)
    if overrides:
        raise InputError(f"the recipe {name} has no options: {' '.join(overrides)}")
    folders: list[Path] = module.build(source, out, log)
    for first, second in combinations(folders, 2):
        if first.parent == second.parent and (problems := lint_pair(first, second)):
            lines = "\n  ".join(problems[:20])
            raise DataError(f"recipe {name!r}: {first} and {second} overlap:\n  {lines}")
    return folders
