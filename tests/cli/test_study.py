"""`mera-ds study`: what a grid says, and what happens to the others when a run fails."""

from pathlib import Path

import pytest

from mera_ds.cli.study import Grid, GridRun, cells, read_grid
from mera_ds.config import load_profile
from mera_ds.errors import InputError

from .commands import run

PLUGIN = """
from mera_ds.model.connectors.mlp import MlpConnector
from mera_ds.plugin import register_connector

class Broken(MlpConnector):
    def forward(self, values, mask):
        raise ZeroDivisionError("in a plugin")

register_connector("broken", Broken)
"""
PROFILE = """
base: tiny
plugins: [broken.py]
order: [image]
align: {max_steps: 1}
tune: {max_steps: 1}
evaluate: {limit: 2, max_new_tokens: 2}
"""
GRID = """
profile: profile.yaml
orders: {short: [image]}
seeds: [0]
runs:
  broken: {method: expert, settings: {modalities.image.connector.kind: broken}}
  sound: {method: expert}
"""
MERGE = GridRun(method="merge")


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    folder = tmp_path / "grids"
    folder.mkdir()
    for name, text in (("broken.py", PLUGIN), ("profile.yaml", PROFILE), ("grid.yaml", GRID)):
        (folder / name).write_text(text)
    return folder / "grid.yaml"


@pytest.mark.slow
def test_an_unforeseen_error_of_one_run_does_not_stop_the_others(
    grid: Path, tmp_path: Path
) -> None:
    """The command is given elsewhere than in the grid's folder, where its profile lies."""
    ended = run("mera-ds study grids/grid.yaml --out runs", tmp_path)
    assert ended.status == 2
    assert "error: 1 of 2 runs failed" in ended.errors
    assert "runs/broken-short-s0: ZeroDivisionError: in a plugin" in ended.errors
    assert 'raise ZeroDivisionError("in a plugin")' in ended.errors
    assert (tmp_path / "runs/sound-short-s0/results.jsonl").exists()
    assert not (tmp_path / "runs/broken-short-s0/results.jsonl").exists()


def test_a_profile_file_lies_beside_the_grid(grid: Path) -> None:
    assert load_profile(read_grid(grid).profile).align.max_steps == 1
    grid.write_text(GRID.replace("profile.yaml", "pocket"))
    assert read_grid(grid).profile == "pocket"


def test_every_line_in_every_order_with_every_seed() -> None:
    two = GridRun(method="mera", orders=("back",), seeds=(1,))
    lines = {"one": MERGE, "two": two}
    found = Grid(
        profile="tiny", orders={"on": ("image",), "back": ("audio",)}, seeds=(0, 1), runs=lines
    )
    names = ["one-on-s0", "one-back-s0", "one-on-s1", "one-back-s1", "two-back-s1"]
    assert [cell.name for cell in cells(found)] == names
    assert [cell.name for cell in cells(found, "back", 1)] == names[-2:]


def test_a_grid_of_nothing() -> None:
    line = GridRun(method="merge", orders=("on",))
    found = Grid(
        profile="tiny",
        orders={"on": ("image",), "back": ("audio",)},
        seeds=(0,),
        runs={"one": line},
    )
    with pytest.raises(InputError, match="nothing to run: no line of the grid has that order"):
        cells(found, "back")


def test_a_line_names_what_the_grid_has(grid: Path) -> None:
    grid.write_text(GRID.replace("{method: expert}", "{method: expert, seeds: [3]}"))
    with pytest.raises(InputError, match=r"runs\.sound: seed 3 is unknown; the grid has 0"):
        read_grid(grid)
    grid.write_text(GRID.replace("{method: expert}", "{method: expert, orders: [shrot]}"))
    with pytest.raises(InputError, match=r"order 'shrot' is unknown; did you mean 'short'\?"):
        read_grid(grid)


def test_two_runs_of_one_name() -> None:
    found = Grid(
        profile="tiny",
        orders={"b-c": ("image",), "c": ("audio",)},
        seeds=(0,),
        runs={"a": MERGE, "a-b": MERGE},
    )
    with pytest.raises(InputError, match="2 runs of the grid would be called a-b-c-s0"):
        cells(found)


def test_settings_of_a_line_leave_their_neighbours_alone() -> None:
    """Nested or dotted, they say the same, and a line's are stronger than the grid's."""
    line = GridRun(method="mera", settings={"replay": {"percent": 1}, "merge": {"options": {}}})
    everyone = {"replay.percent": 5, "replay": {"realign_percent": 10}}
    found = Grid(
        profile="tiny",
        settings=everyone,
        orders={"on": ("image",)},
        seeds=(0,),
        runs={"one": line},
    )
    config = load_profile("tiny", cells(found)[0].overrides)
    assert (config.replay.percent, config.replay.realign_percent) == (1, 10)
