"""The commands `mera-ds shards …` and `mera-ds pocket fetch`."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mera_ds.config import cache_folder
from mera_ds.errors import DataError, InputError, MeraError

if TYPE_CHECKING:  # it needs torch
    from mera_ds.cli.fit import RunFit


def build(arguments: argparse.Namespace) -> None:
    """Build a recipe's shard sets."""
    from mera_ds import recipes

    recipes.build(
        arguments.name,
        arguments.source,
        arguments.out,
        print,
        arguments.overrides,
        arguments.workers,
    )


def usable_cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0))


def lint(arguments: argparse.Namespace) -> None:
    """Check shard sets, that no two splits of a dataset overlap, and that they fit a run.

    Raises:
        DataError: if any problem was found; each is printed.
    """
    from mera_ds.cli.fit import RunFit

    fit = None
    if arguments.run is not None or arguments.profile is not None:
        fit = RunFit(arguments.run, arguments.profile)
    kinds = _media_kinds(arguments.plugin, arguments.run)
    roots = arguments.folders or (fit.folders() if fit else [])
    if not roots:
        raise InputError("name the shard folders to check, or a run with --run")
    folders = _shard_folders(roots)
    if arguments.quarantine:
        _quarantine(folders, kinds)
        return
    found = {folder: _lint_folder(folder, kinds, fit) for folder in folders}
    problems = [problem for entries in found.values() for problem in entries]
    problems += _overlaps([folder for folder, entries in found.items() if not entries])
    for problem in problems:
        print(f"  {problem}")
    if problems:
        raise DataError(f"{len(problems)} problems in {len(folders)} shard sets; rebuild them")


def _lint_folder(folder: Path, kinds: Mapping[str, str], fit: "RunFit | None") -> list[str]:
    """Check one shard set, print how it is, and return its problems."""
    from mera_ds.shards.lint import lint as lint_folder
    from mera_ds.shards.remote import source_url

    decoder = _decoder(folder, kinds)
    url = source_url(folder)
    problems = lint_folder(folder, decoder) if url is None else []
    used = fit is not None and fit.uses(folder)
    if fit and used and not problems:
        problems = fit.problems(folder)
    fits = " and fits the run" if used else ""
    print(f"{url or folder}: {'sound' + fits if not problems else f'{len(problems)} problems'}")
    if url is not None:
        print("  only its index and texts were examined; lint its tars and media where they lie")
        return problems
    if fit and not used:
        print("  it is none of the run's shard sets: its texts were not compared with the run")
    if decoder is None:
        print("  its media were not decoded: their kind is unknown; give --plugin or --run")
    return problems


def _overlaps(folders: Sequence[Path]) -> list[str]:
    """Return what two splits of one dataset have in common; of remote ones nothing is fetched."""
    from mera_ds.shards.lint import lint_pair
    from mera_ds.shards.remote import source_url

    local = [folder for folder in folders if source_url(folder) is None]
    return [
        problem
        for first, second in combinations(local, 2)
        if first.parent == second.parent
        for problem in lint_pair(first, second)
    ]


def _media_kinds(plugins: Sequence[Path], run: Path | None) -> Mapping[str, str]:
    """Load plugins, and return modality -> media kind: its own name, or what a run decodes."""
    from mera_ds.media import DECODERS
    from mera_ds.registry import load_plugin

    for plugin in plugins:
        load_plugin(plugin)
    return {kind: kind for kind in DECODERS} | (_kinds_of_run(run) if run is not None else {})


def _kinds_of_run(run: Path) -> dict[str, str]:
    """Return modality -> media kind as a run's encoders take them."""
    from mera_ds.model.encoders import ENCODERS
    from mera_ds.sequence import open_run

    modalities = open_run(run).config.modalities
    return {
        name: ENCODERS[entry.encoder.kind].media
        for name, entry in modalities.items()
        if entry.encoder.kind in ENCODERS
    }


def _quarantine(folders: Sequence[Path], kinds: Mapping[str, str]) -> None:
    """Write each folder's quarantine and print what is left out."""
    from mera_ds.shards.damage import quarantine_folder
    from mera_ds.shards.format import read_index
    from mera_ds.shards.remote import source_url

    for folder in folders:
        if (url := source_url(folder)) is not None:
            raise InputError(f"{url} can't be changed from here; put it in quarantine there")
        found = quarantine_folder(folder, _decoder(folder, kinds))
        total = read_index(folder).counts["samples"]
        print(f"{folder}: {len(found.samples)} of {total} samples in quarantine")
        for key, reason in found.samples.items():
            print(f"  {key}: {reason}")


def _decoder(folder: Path, kinds: Mapping[str, str]) -> Callable[[str, bytes, str], Any] | None:
    """Return what decodes a folder's media; None if their kind is not known."""
    from mera_ds.media import decode
    from mera_ds.shards.format import read_index

    try:
        modality = read_index(folder).modality
    except MeraError:
        modality = "image"  # lint itself names what is wrong with the index
    if modality not in kinds:
        return None
    return lambda extension, content, name: decode(kinds[modality], extension, content, name)


def preview(arguments: argparse.Namespace) -> None:
    """Show samples as text, or write a page."""
    from mera_ds.shards import preview as pages

    if arguments.count < 1:
        raise InputError(f"--count {arguments.count} must be at least 1")
    folders = _shard_folders(arguments.folders)
    if arguments.html is None:
        for folder in folders:
            print(pages.preview(folder, arguments.count))
    else:
        pages.write_html(folders, arguments.html, arguments.count)
        print(f"written: {arguments.html}")


def _shard_folders(roots: Sequence[Path]) -> list[Path]:
    from mera_ds.shards.remote import refresh

    folders: list[Path] = []
    for root in roots:
        for split in ("train", "test"):
            refresh(root / split)
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
