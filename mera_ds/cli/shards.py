"""The commands `mera-ds shards …` and `mera-ds pocket fetch`."""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mera_ds.config import cache_folder
from mera_ds.errors import DataError, InputError


def build(arguments: argparse.Namespace) -> None:
    """Build a recipe's shard sets."""
    from mera_ds import recipes

    recipes.build(arguments.name, arguments.source, arguments.out, print)


def lint(arguments: argparse.Namespace) -> None:
    """Check shard sets, and that no two splits of a dataset overlap.

    Raises:
        DataError: if any problem was found; each is printed.
    """
    from mera_ds.shards.lint import lint as lint_folder
    from mera_ds.shards.lint import lint_pair

    folders = _shard_folders(arguments.folders)
    if arguments.quarantine:
        _quarantine(folders)
        return
    problems = []
    for folder in folders:
        found = lint_folder(folder, _decoder(folder))
        print(f"{folder}: {'sound' if not found else f'{len(found)} problems'}")
        problems += found
    for number, first in enumerate(folders):
        for second in folders[number + 1 :]:
            if first.parent == second.parent:
                problems += lint_pair(first, second)
    for problem in problems:
        print(f"  {problem}")
    if problems:
        raise DataError(f"{len(problems)} problems in {len(folders)} shard sets; rebuild them")


def _quarantine(folders: Sequence[Path]) -> None:
    """Write each folder's quarantine and print what is left out."""
    from mera_ds.shards.damage import quarantine_folder
    from mera_ds.shards.format import read_index

    for folder in folders:
        found = quarantine_folder(folder, _decoder(folder))
        total = read_index(folder).counts["samples"]
        print(f"{folder}: {len(found.samples)} of {total} samples in quarantine")
        for key, reason in found.samples.items():
            print(f"  {key}: {reason}")


def _decoder(folder: Path) -> Callable[[str, bytes, str], Any]:
    """Return a decoder that asks the index for the modality when it is first needed."""
    from mera_ds.data.decode import decode
    from mera_ds.shards.format import read_index

    @functools.cache
    def modality() -> str:
        return read_index(folder).modality

    return lambda extension, content, name: decode(modality(), extension, content, name)


def preview(arguments: argparse.Namespace) -> None:
    """Show samples as text, or write a page."""
    from mera_ds.shards import preview as pages

    folders = _shard_folders(arguments.folders)
    if arguments.html is None:
        for folder in folders:
            print(pages.preview(folder, arguments.count))
    else:
        pages.write_html(folders, arguments.html, arguments.count)
        print(f"written: {arguments.html}")


def _shard_folders(roots: Sequence[Path]) -> list[Path]:
    folders: list[Path] = []
    for root in roots:
        found = sorted(path.parent for path in root.rglob("index.json"))
        if not found:
            raise InputError(f"{root} holds no shard set (no index.json below it)")
        folders += found
    return folders


def fetch_pocket(arguments: argparse.Namespace) -> None:
    """Bring the weights of the profile `pocket`."""
    from mera_ds.pocket.fetch import fetch

    weights = fetch(cache_folder(), print)
    print(f"pocket weights: {weights.root}")
