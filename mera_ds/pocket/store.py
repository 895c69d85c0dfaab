"""The folder of converted pocket weights: where it lies, what must be in it, what is wrong with it.

    <cache>/pocket/<version>/<component>/{weights and their configuration}, manifest.json

The manifest of a component is written last, with size and SHA-256 of every other file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mera_ds.errors import DataError, InputError
from mera_ds.files import read_json, sha256_file, write_json
from mera_ds.pocket.packages import (
    AISFX,
    EFFICIENTNET_LITE0,
    MINILM,
    PACKAGES,
    SMOLLM2,
    VERSION,
    Package,
)

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
REMEDY = "run 'mera-ds pocket fetch'"


@dataclass(frozen=True)
class PocketWeights:
    """Where the converted weights are."""

    root: Path
    backbone: Path
    """Folder of a Hugging Face Llama checkpoint: float16 safetensors, tokenizer, chat template."""
    vision: Path
    """Safetensors of EfficientNet-Lite0: the weights of the visual encoder kinds."""
    audio: Path
    """Safetensors of the aisfx network: the weights of the encoder kind `aisfx`."""
    bert: Path
    """Safetensors of a BERT, from which a `qformer` connector of width 384 can start."""


def pocket_folder(cache: Path) -> Path:
    """Return the folder of this version's weights below a cache folder."""
    return cache / "pocket" / VERSION


def locate(cache: Path) -> PocketWeights:
    """Return the weights' paths after a check of names and sizes (no hashing).

    Raises:
        InputError: if they have not been fetched.
        DataError: if a file is missing or has another size.
    """
    root = pocket_folder(cache)
    for package in PACKAGES:
        if not (root / package.component / MANIFEST).exists():
            raise InputError(f"the pocket weights are not in {root}; {REMEDY}")
        problems = component_problems(root / package.component, package, hashes=False)
        if problems:
            raise DataError(f"{problems[0]}; {REMEDY} to restore it")
    return PocketWeights(
        root=root,
        backbone=root / SMOLLM2.component,
        vision=root / EFFICIENTNET_LITE0.component / WEIGHTS,
        audio=root / AISFX.component / WEIGHTS,
        bert=root / MINILM.component / WEIGHTS,
    )


def verify(cache: Path) -> list[str]:
    """Hash every file; return one line for each missing, changed or foreign one."""
    root = pocket_folder(cache)
    return [
        problem
        for package in PACKAGES
        for problem in component_problems(root / package.component, package, hashes=True)
    ]


def write_manifest(folder: Path, package: Package) -> None:
    """Record what a finished component folder holds and where it came from."""
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner may read
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {
        "schema": 1,
        "component": package.component,
        "package": package.requirement,
        "wheel_sha256": package.wheel_sha256,
        "licence": package.licence,
        "attribution": package.attribution,
        "files": files,
    }
    write_json(folder / MANIFEST, manifest)


def component_problems(folder: Path, package: Package, hashes: bool) -> list[str]:
    """Compare a component folder with its manifest; `hashes` also compares the contents."""
    if not (folder / MANIFEST).exists():
        return [f"{folder / MANIFEST} is missing"]
    try:
        files = _manifest_files(read_json(folder / MANIFEST), package)
    except (InputError, KeyError, TypeError, AttributeError):
        return [f"{folder / MANIFEST} is damaged or of another version"]
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    problems = [f"{folder / name} is missing" for name in sorted(files.keys() - present)]
    problems += [
        f"{folder / name} does not belong there" for name in sorted(present - files.keys())
    ]
    for name in sorted(files.keys() & present):
        path, (size, digest) = folder / name, files[name]
        if path.stat().st_size != size:
            problems.append(f"{path} has {path.stat().st_size} bytes instead of {size}")
        elif hashes and sha256_file(path) != digest:
            problems.append(f"{path} has changed (sha256 differs from its manifest)")
    return problems


def _manifest_files(manifest: Any, package: Package) -> dict[str, tuple[int, str]]:
    if manifest["wheel_sha256"] != package.wheel_sha256:
        raise KeyError("wheel_sha256")
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
