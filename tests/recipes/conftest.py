"""Sources and shard sets of the published datasets."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mera_ds.recipes import build

from .sources import POINTS, WRITERS

SMALL = {
    "audiocaps": ["tolerance=0.3"],
    "cap3d": [f"points={POINTS // 2}", "test_size=3", "train_size=6"],
    "cap3dqa": [f"points={POINTS // 2}", "test_size=3", "train_size=5"],
    "coco": ["test_size=3"],
}
"""Options with which the small sources can be built."""


class Built:
    """A source, and the shard sets that were made of it."""

    def __init__(self, name: str, root: Path, log: list[str]) -> None:
        self.name = name
        self.source = root / "source"
        self.out = root / "out"
        self.log = log

    @property
    def train(self) -> Path:
        return self.out / self.name / "train"

    @property
    def test(self) -> Path:
        return self.out / self.name / "test"

    def build(self, *options: str, out: Path | None = None, workers: int = 0) -> list[Path]:
        """Build again, with other options or elsewhere."""
        target = self.out if out is None else out
        return build(self.name, self.source, target, self.log.append, options, workers)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """Return a function that builds a dataset from its small source, once."""
    known: dict[str, Built] = {}

    def get(name: str) -> Built:
        if name not in known:
            known[name] = make(name, tmp_path_factory.mktemp(name))
            known[name].build(*SMALL.get(name, []))
        return known[name]

    return get


def make(name: str, root: Path) -> Built:
    """Write the small source of a dataset."""
    result = Built(name, root, [])
    result.source.mkdir()
    WRITERS[name](result.source)
    return result
