"""Every file that a configuration needs: backbone, encoders, connectors, shard sets."""

from functools import partial
from pathlib import Path

from mera_ds.config import RunConfig, resolve_path
from mera_ds.doctor.backbone import examine_backbone
from mera_ds.doctor.files import size_text
from mera_ds.doctor.findings import Finding, describe, look
from mera_ds.doctor.weights import OFFICIAL, POCKET, UNKNOWN, Official
from mera_ds.errors import DataError, InputError
from mera_ds.shards.format import INDEX_NAME
from mera_ds.shards.reader import ShardReader
from mera_ds.shards.remote import data_folder, is_url, mirror, refresh, source_url

SPLITS = ("train", "test")
POCKET_PLACE = "{cache}/pocket/"


def examine(config: RunConfig, run: Path | None) -> list[Finding]:
    """Look for everything that a run reads.

    Args:
        config: the run's configuration.
        run: its folder; None: there is none yet, and what is inside is made by `mera-ds init`.
    """
    findings = _backbone(config, run)
    findings += _components(config, run)
    for modality, entry in config.modalities.items():
        for text in entry.data:
            findings += _shards(config, run, modality, text)
    return findings


def missing_paths(config: RunConfig, run: Path) -> list[Path | str]:
    """Return what a run reads and is not there (a path or URL), without looking into anything."""
    texts = [config.backbone.path]
    data: list[str] = []
    for entry in config.modalities.values():
        parts = (entry.encoder, entry.connector)
        texts += [part.weights for part in parts if part.weights is not None]
        data += entry.data
    paths = [resolve_path(text, run) for text in texts]
    folders = [data_folder(text, run) / split for text in data for split in SPLITS]
    indexes = [_place(folder, INDEX_NAME) for folder in folders if not _has_index(folder)]
    return [*(path for path in paths if not path.exists()), *indexes]


def _has_index(folder: Path) -> bool:
    try:
        refresh(folder)
    except (InputError, DataError):
        return False
    return (folder / INDEX_NAME).exists()


def _place(folder: Path, name: str) -> Path | str:
    """Return where a file of a shard folder is looked for."""
    url = source_url(folder)
    return folder / name if url is None else f"{url}/{name}"


def _backbone(config: RunConfig, run: Path | None) -> list[Finding]:
    text = config.backbone.path
    if _comes_later(text, run):
        return [_later("backbone", text)]
    folder = resolve_path(text, run or Path())
    return examine_backbone(folder, _source(text), config.prompt)


def _components(config: RunConfig, run: Path | None) -> list[Finding]:
    """Check weights of encoders and connectors; those that several modalities share only once."""
    uses: dict[tuple[str, Official], list[str]] = {}
    for modality, entry in config.modalities.items():
        parts = (("encoder", entry.encoder), ("connector", entry.connector))
        for role, part in parts:
            if part.weights is not None:
                official = OFFICIAL.get(part.kind, UNKNOWN)
                user = f"{modality} {role} ({part.kind})"
                uses.setdefault((part.weights, official), []).append(user)
    findings = []
    for (text, official), users in uses.items():
        what = ", ".join(users)
        if _comes_later(text, run):
            findings.append(_later(what, text))
        else:
            source = _source(text) or official.source
            path = resolve_path(text, run or Path())
            findings.append(look(what, path, source, official.check))
    return findings


def _shards(config: RunConfig, run: Path | None, modality: str, text: str) -> list[Finding]:
    if _comes_later(text, run):
        return [_later(f"{modality} shards", text)]
    if is_url(text):
        return _remote_shards(modality, text)
    folder = resolve_path(text, run or Path())
    source = f"mera-ds shards build {folder.name} --source DIR --out {folder.parent}"
    if "{repository}" in text:
        source = "part of the repository"
    elif "{run}" in text:
        source = f"made by 'mera-ds init' with the recipe '{config.build}'"
    check = partial(_check_split, modality=modality)
    return [
        look(f"{modality} shards {folder.name}/{split}", folder / split, source, check)
        for split in SPLITS
    ]


def _remote_shards(modality: str, url: str) -> list[Finding]:
    """Look at the indexes behind a URL; the tars are fetched and checked when they are read."""
    url = url.rstrip("/")
    source = f"its server; otherwise correct modalities.{modality}.data"
    return [
        describe(
            f"{modality} shards {url.rpartition('/')[2]}/{split}",
            f"{url}/{split}",
            source,
            partial(_check_remote_split, url, split, modality),
        )
        for split in SPLITS
    ]


def _check_remote_split(url: str, split: str, modality: str) -> str:
    return _check_split(mirror(url) / split, modality)


def _check_split(folder: Path, modality: str) -> str:
    with ShardReader(folder) as reader:
        index = reader.index
        if index.modality != modality:
            raise DataError(f"it holds modality '{index.modality}', not '{modality}'")
        reader.require_whole()
    size = sum(shard.bytes for shard in index.shards)
    counts = index.usable_counts
    lost = index.counts["samples"] - counts["samples"]
    left_out = f", {lost} media in quarantine" if lost else ""
    return f"{counts['samples']} media, {counts['texts']} texts, {size_text(size)}{left_out}"


def _comes_later(text: str, run: Path | None) -> bool:
    return run is None and "{run}" in text


def _later(what: str, text: str) -> Finding:
    return Finding(
        what=what,
        path=Path(text),
        state="later",
        detail="inside the run's folder",
        source="'mera-ds init'",
    )


def _source(text: str) -> str | None:
    """Return where a file comes from that is known by its place; None otherwise."""
    if text.startswith(POCKET_PLACE):
        return POCKET.source
    return "'mera-ds init'" if "{run}" in text else None
