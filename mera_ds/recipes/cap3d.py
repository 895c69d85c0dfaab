"""Recipe `cap3d`: Cap3D (Luo et al. 2024), paper Appendix A.

Captions longer than 100 characters are left out; 50K objects for training and 1K others for the
test are drawn at random. Point clouds come from Cap3D (`.pt`, `.ply`) or PointLLM (`.npy`).
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mera_ds.errors import InputError
from mera_ds.recipes.official.contents import (
    CommonOptions,
    Contents,
    Dataset,
    Row,
    caption,
    clean,
    draw_rows,
    full_rows,
)
from mera_ds.recipes.official.convert import Conversion
from mera_ds.recipes.official.sources import MediaFiles, SourceFolder, read_lines, read_text

CAPTIONS = (
    "Cap3D_automated_Objaverse_full.csv",
    "Cap3D_automated_Objaverse_no3Dword.csv",
    "Cap3D_automated_Objaverse_old.csv",
    "Cap3D_automated_Objaverse.csv",
)
ORIGIN = "huggingface.co/datasets/tiange/Cap3D"
HOLDOUT = "val_object_ids_3000.txt"
"""PointLLM's validation ids; if it is there, the test objects are drawn from them."""
POINTS_ORIGIN = (
    "Cap3D's compressed_pcs_pt_*.zip or compressed_pcs_*.zip, unpacked or not, or PointLLM's "
    "8192_npy/"
)
FOLDERS = ("Cap3D_pcs_pt", "PointCloud_pt_zips/Cap3D_pcs_pt", "Cap3D_pcs", "8192_npy", "points")
ARCHIVES = ("compressed_pcs*.zip", "*/compressed_pcs*.zip")
DAMAGED = frozenset(("6760e543e1d645d5aaacd3803bcae524", "b91c0711149d460a8004f9c06d3b7f38"))
"""Objects whose colours are damaged; PointLLM leaves them out, too."""
UID = re.compile(r"[0-9a-f]{32}")
_RECORD = re.compile(r'^"?([0-9a-f]{32})"?,', re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class PointOptions(CommonOptions):
    """Options of the recipes on these objects."""

    points: int = 8192
    """How many points are kept of an object, drawn at random."""
    normalise: bool = True
    """Move the centroid to the origin and the farthest point to distance 1, as PointLLM does."""
    exclude: str | None = None
    """A file of ids (such as another dataset's `test/ids.txt`) that training must not have."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.points < 1:
            raise InputError(f"points is {self.points}; it must be at least 1")

    def recorded(self) -> dict[str, Any]:
        """Return the options with the name, but not the place, of the file of excluded ids."""
        return super().recorded() | {"exclude": self.exclude and Path(self.exclude).name}

    @property
    def conversion(self) -> Conversion:
        """How point clouds are stored."""
        return Conversion(
            "pointcloud", points=self.points, normalise=self.normalise, seed=self.seed
        )


@dataclass(frozen=True, kw_only=True)
class Options(PointOptions):
    """Options of `cap3d`."""

    max_chars: int = 100
    """Longest caption in characters."""
    train_size: int | None = 50_000


def read(source: SourceFolder, options: Options) -> Contents:
    """Return training and test rows."""
    captions_file = source.need_one_of(CAPTIONS, ORIGIN)
    holdout_file = source.find(HOLDOUT)
    media = point_clouds(source)
    source.require_all()
    dropped: Counter[str] = Counter()
    rows = []
    for uid, text in read_captions(captions_file):
        if uid in DAMAGED:
            dropped["damaged object"] += 1
        elif len(text) > options.max_chars:
            dropped[f"caption longer than {options.max_chars} characters"] += 1
        else:
            rows.append(object_row(uid, caption(0, text)))
    rows = full_rows({row.key: row for row in rows}.values(), dropped)
    held_out = read_ids(holdout_file) if holdout_file else None
    candidates = rows if held_out is None else [row for row in rows if row.key in held_out]
    test = draw_rows(candidates, options.test_size, options.seed, "cap3d/test")
    never = {row.key for row in test} | (held_out or set())
    train = without(rows, never | excluded_ids(source, options.exclude), dropped)
    train = draw_rows(train, options.train_size, options.seed, "cap3d/train")
    return Contents(train, test, media, options.conversion, dropped)


def point_clouds(source: SourceFolder) -> MediaFiles:
    """Return the point clouds."""
    return source.media(FOLDERS, ARCHIVES, POINTS_ORIGIN)


def object_row(uid: str, text: Any) -> Row:
    """Return a row on an Objaverse object."""
    return Row(uid, uid, (f"{uid}.pt", f"{uid}.ply", f"{uid}_8192.npy"), text)


def without(rows: Sequence[Row], ids: Collection[str], dropped: Counter[str]) -> list[Row]:
    """Return the rows on other objects than some, and count those left out."""
    kept = [row for row in rows if row.key not in ids]
    dropped["held out from training"] += len(rows) - len(kept)
    return kept


def excluded_ids(source: SourceFolder, path: str | None) -> set[str]:
    """Return the ids in the file that the option `exclude` names, and record that it is used."""
    if path is None:
        return set()
    if not Path(path).is_file():
        raise InputError(f"exclude={path}: there is no such file")
    source.record("exclude", Path(path))
    return read_ids(Path(path))


def read_ids(path: Path) -> set[str]:
    """Return the Objaverse ids that begin the lines of a file."""
    return {line[:32] for line in read_lines(path) if UID.match(line)}


def read_captions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield id and caption of every record of a caption file, which has no header.

    A record begins where a line begins with an id and a comma. So a quotation mark that stands on
    one side only, which would make a CSV reader swallow the next records, does no harm.
    """
    _, *parts = _RECORD.split(read_text(path))
    for uid, text in zip(parts[::2], parts[1::2], strict=True):
        yield uid, unquote(clean(text))


def unquote(text: str) -> str:
    """Return a field of a CSV file without its quotation marks, also if only one is there."""
    if len(text) > 1 and text[0] == text[-1] == '"':
        return clean(text[1:-1].replace('""', '"'))
    if text.count('"') % 2 and text.startswith('"'):
        return clean(text[1:])
    if text.count('"') % 2 and text.endswith('"'):
        return clean(text[:-1])
    return text


DATASET = Dataset(
    name="cap3d", version=1, modality="pointcloud", licence="ODC-By-1.0", options=Options, read=read
)
