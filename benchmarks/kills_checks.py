"""What `kills.py` asks of the files that a killed command, and a finished one, leaves."""

import hashlib
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mera_ds.errors import MeraError
from mera_ds.files import TEMPORARY, read_json, sha256_file
from mera_ds.manifest import MANIFEST, read_manifest
from mera_ds.shards.format import read_index
from mera_ds.shards.lint import verify

WITH_TIMES = {".lock", "tensorboard", "metrics.jsonl", "processes.jsonl", "verified", "hashes.json"}
"""Files and folders that hold times or exist only as long as a process does."""


def listing(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file but those that hold times, and each step's last loss."""
    found = {
        str(path.relative_to(folder)): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not WITH_TIMES.intersection(path.relative_to(folder).parts)
        and not path.name.endswith(".lock")
    }
    rows = {f"{row['name']} {row['step']}": row["loss"] for row in _steps(folder)}
    found["the losses"] = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    return found


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return the files that are missing, too many or other than in the undisturbed run."""
    names = sorted(expected.keys() | found.keys())
    return [f"{name} differs" for name in names if expected.get(name) != found.get(name)]


def leftovers(folder: Path) -> list[str]:
    """Return what is unfinished."""
    return [f"{path} is left" for path in sorted(folder.rglob(f"*{TEMPORARY}*"))]


def repeated_steps(folder: Path) -> int:
    """Return how many optimizer steps were taken more than once."""
    rows = [(row["name"], row["step"]) for row in _steps(folder)]
    return len(rows) - len(set(rows))


def _steps(folder: Path) -> list[dict[str, float]]:
    """Return the rows of optimizer steps; scores and times of generation have no loss."""
    path = folder / "run/metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if "loss" in row]


def unreadable(folder: Path) -> list[str]:
    """Return what has a final name and can't be read, or isn't what its manifest or index says."""
    problems = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and TEMPORARY not in str(path.relative_to(folder)):
            try:
                _read(path)
            except (MeraError, SafetensorError, OSError, ValueError, tarfile.TarError) as error:
                problems.append(f"{path}: {type(error).__name__}: {error}")
    return problems


def _read(path: Path) -> None:
    if path.name in CHECKS:
        CHECKS[path.name](path)
    elif path.name != "metrics.jsonl" and path.suffix in CHECKS:
        CHECKS[path.suffix](path)


def _read_manifest(path: Path) -> None:
    manifest = read_manifest(path.parent)
    for entry in (*manifest.lineage, *manifest.connectors.values()):
        _require(path.parent / entry.file, entry.sha256)


def _read_checkpoint(path: Path) -> None:
    for name, sha256 in read_json(path)["files"].items():
        _require(path.parent / f"{name}.safetensors", sha256)


def _read_shards(path: Path) -> None:
    read_index(path.parent)
    for problem in verify(path.parent):
        raise ValueError(problem)


def _read_lines(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
        json.loads(line)


def _read_safetensors(path: Path) -> None:
    with safe_open(str(path), framework="numpy") as file:
        for name in file.keys():
            file.get_tensor(name)


def _read_tar(path: Path) -> None:
    with tarfile.open(path) as tar:
        tar.getmembers()


def _require(path: Path, sha256: str) -> None:
    if sha256_file(path) != sha256:
        raise ValueError(f"{path} has another hash")


CHECKS: dict[str, Callable[[Path], object]] = {
    MANIFEST: _read_manifest,
    "state.json": _read_checkpoint,
    "index.json": _read_shards,
    ".json": read_json,
    ".jsonl": _read_lines,
    ".safetensors": _read_safetensors,
    ".tar": _read_tar,
}
"""By name or ending, what raises an error if a file can't be read."""
