"""Every file that a configuration needs: backbone, encoders, connectors, shard sets."""

from functools import partial
from pathlib import Path

from mera_ds.config import RunConfig, resolve_path
from mera_ds.doctor.backbone import examine_backbone
from mera_ds.doctor.files import size_text
from mera_ds.doctor.findings import Finding, look
from mera_ds.doctor.weights import OFFICIAL, POCKET, UNKNOWN, Official
from mera_ds.errors import DataError
from mera_ds.shards.format import INDEX_NAME, read_index

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


def missing_paths(config: RunConfig, run: Path) -> list[Path]:
    """Return what a run reads and is not there, without looking into anything."""
    texts = [config.backbone.path]
    folders = []
    for entry in config.modalities.values():
        parts = (entry.encoder, entry.connector)
        texts += [part.weights for part in parts if part.weights is not None]
        folders += [resolve_path(text, run) / split for text in entry.data for split in SPLITS]
    indexes = [folder / INDEX_NAME for folder in folders]
    paths = [*(resolve_path(text, run) for text in texts), *indexes]
    return [path for path in paths if not path.exists()]


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


def _check_split(folder: Path, modality: str) -> str:
    index = read_index(folder)
    if index.modality != modality:
        raise DataError(f"it holds modality '{index.modality}', not '{modality}'")
    for shard in index.shards:
        path = folder / shard.name
        size = path.stat().st_size if path.exists() else 0
        if size != shard.bytes:
            raise DataError(
                f"{shard.name} has {size} bytes, its index says {shard.bytes}; build it again"
            )
    texts = sum(len(sample.texts) for sample in index.samples)
    size = sum(shard.bytes for shard in index.shards)
    return f"{len(index.samples)} media, {texts} texts, {size_text(size)}"


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
