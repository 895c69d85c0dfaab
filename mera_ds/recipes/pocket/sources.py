"""The packages that the pocket set is cut from: names, hashes, licences, and access to their files.

Nothing is downloaded here. A folder holds the package files as `npm pack` and `apt-get download`
leave them; they are read in place, without being unpacked.
"""

import io
import lzma
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mera_ds.errors import DataError, InputError
from mera_ds.files import sha256_file

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60


@dataclass(frozen=True)
class Package:
    """One package file of a registry, and what the pocket set takes from it."""

    name: str
    version: str
    registry: str
    """`npm`, `apt` or `pip`."""
    file: str
    sha256: str
    licence: str
    used: str

    @property
    def command(self) -> str:
        """The command that downloads `file` into the current folder."""
        return {
            "npm": f"npm pack {self.name}@{self.version}",
            "apt": f"apt-get download {self.name}={self.version}",
            "pip": f"pip download --no-deps {self.name}=={self.version}",
        }[self.registry]

    def as_json(self) -> dict[str, str]:
        """Return this package as an entry of SOURCES.json."""
        return {
            "package": self.name,
            "version": self.version,
            "registry": self.registry,
            "file": self.file,
            "sha256": self.sha256,
            "licence": self.licence,
            "used": self.used,
            "command": self.command,
        }


NOTO = Package(
    name="emoji-datasource-google",
    version="16.0.0",
    registry="npm",
    file="emoji-datasource-google-16.0.0.tgz",
    sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    licence="Apache-2.0 (Noto images), MIT (package data)",
    used="image: 64 px PNG drawings and their subcategories",
)
EMOJIBASE = Package(
    name="emojibase-data",
    version="17.0.0",
    registry="npm",
    file="emojibase-data-17.0.0.tgz",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    licence="MIT",
    used="image and video: English names, groups and subgroups",
)
FLUENT = tuple(
    Package(
        name=f"@lobehub/fluent-emoji-anim-{number}",
        version="1.0.0",
        registry="npm",
        file=f"lobehub-fluent-emoji-anim-{number}-1.0.0.tgz",
        sha256=sha256,
        licence="MIT",
        used="video: animated clips",
    )
    for number, sha256 in (
        (1, "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea"),
        (2, "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0"),
        (3, "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43"),
        (4, "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3"),
    )
)
SOUNDFONT = Package(
    name="musescore-general-soundfont-small",
    version="0.2.1-1",
    registry="apt",
    file="musescore-general-soundfont-small_0.2.1-1_all.deb",
    sha256="65f9c1cb658c49e8713d2c95238d5d26868f520341f74a4fe26248a8f763c739",
    licence="MIT (parts public domain or CC0-1.0)",
    used="audio: the sampled instruments that play the notes and melodies",
)
SONIC_PI = Package(
    name="sonic-pi-samples",
    version="3.2.2~repack-8",
    registry="apt",
    file="sonic-pi-samples_3.2.2~repack-8_all.deb",
    sha256="25f2312d2fae005e6ad0f4726b8ed3084e776006a5a132083506e960224ac79d",
    licence="CC0-1.0",
    used="audio: recorded drums, only the files that its copyright file lists as CC0",
)
FURNITURE = Package(
    name="sweethome3d-furniture",
    version="1.8-1",
    registry="apt",
    file="sweethome3d-furniture_1.8-1_all.deb",
    sha256="3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668",
    licence="CC0-1.0, CC-BY-3.0 and CC-BY-3.0-US, by catalogue",
    used="pointcloud: points sampled on the surfaces of 3D models, with their names",
)
PACKAGES = (NOTO, EMOJIBASE, *FLUENT, SOUNDFONT, SONIC_PI, FURNITURE)

TOOLS = {"numpy": "2.4.6", "pillow": "13.0.0", "soundfile": "0.14.0", "tinysoundfont": "0.3.7"}
"""Versions that made the checked-in set: codecs and arithmetic decide about single bytes."""


def check_packages(folder: Path) -> None:
    """Raise `InputError` unless all package files lie in `folder` with the recorded hashes.

    One error names all that is missing or different, and the commands that fetch it.
    """
    missing = [package for package in PACKAGES if not (folder / package.file).is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {', '.join(package.file for package in missing)}; fetch with\n"
            + download_commands(folder, missing)
        )
    changed = [
        package for package in PACKAGES if sha256_file(folder / package.file) != package.sha256
    ]
    if changed:
        files = ", ".join(f"{package.file} (expected {package.sha256})" for package in changed)
        raise InputError(
            f"the SHA-256 in {folder} is not the recorded one for {files}; remove them and fetch "
            f"them again with\n{download_commands(folder, changed)}"
        )


def download_commands(folder: Path, packages: Sequence[Package]) -> str:
    """Return the shell lines that fetch packages into a folder."""
    lines = [f"  cd {folder}", *(f"  {package.command}" for package in packages)]
    if any(package.registry == "apt" for package in packages):
        lines.append("  # the apt packages are those of Debian 12, main")
    return "\n".join(lines)


def read_members(folder: Path, package: Package, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Return path -> content of the files of a package whose path `wanted` accepts, in order.

    Paths are as installed, without the leading `package/` of npm or `./` of Debian.

    Raises:
        DataError: the package can't be read, or holds no such file.
    """
    path = folder / package.file
    try:
        with _open_tar(path, package.registry) as tar:
            found = {
                name: tar.extractfile(member).read()  # type: ignore[union-attr]
                for member in tar
                if member.isfile() and wanted(name := member.name.split("/", 1)[-1])
            }
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from None
    if not found:
        raise DataError(f"{path} does not hold the files that this recipe needs")
    return found


def read_member(folder: Path, package: Package, name: str) -> bytes:
    """Return the content of one file of a package; `DataError` if it isn't there."""
    return read_members(folder, package, lambda path: path == name)[name]


def _open_tar(path: Path, registry: str) -> tarfile.TarFile:
    if registry == "npm":
        return tarfile.open(path, "r:gz")
    return tarfile.open(fileobj=io.BytesIO(lzma.decompress(_debian_data(path))))


def _debian_data(path: Path) -> bytes:
    """Return the `data.tar.xz` of a Debian package, which is an `ar` archive."""
    content = path.read_bytes()
    position = len(_AR_MAGIC)
    while position + _AR_HEADER <= len(content):
        header = content[position : position + _AR_HEADER]
        size = int(header[48:58])
        start = position + _AR_HEADER
        if header.startswith(b"data.tar.xz"):
            return content[start : start + size]
        position = start + size + size % 2
    raise DataError(f"{path} holds no data.tar.xz; it is not the recorded Debian package")
