"""The command `mera-ds study`: a grid of methods, orders and seeds, carried out as runs."""

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mera_ds.cli.runs import make_run
from mera_ds.config import RunConfig, load_config, load_profile
from mera_ds.errors import InputError, Interrupted, MeraError
from mera_ds.log import logger, set_up_console
from mera_ds.settings import dump, parse, read_yaml, require_known


@dataclass(frozen=True, kw_only=True)
class GridRun:
    """One line of the grid."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """By dotted key or nested, beside those of the whole grid."""
    orders: tuple[str, ...] = ()
    """Names of the orders that it is carried out in; empty: all."""
    seeds: tuple[int, ...] = ()
    """Seeds that it is carried out with; empty: all."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What a study compares."""

    profile: str
    """A shipped one by name, or a file by its path, relative to the grid's file."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of all runs, by dotted key or nested."""
    orders: Mapping[str, tuple[str, ...]]
    """Orders of modalities, by name."""
    seeds: tuple[int, ...]
    runs: Mapping[str, GridRun]

    def __post_init__(self) -> None:
        """Check that the lines name orders and seeds of the grid."""
        for name, line in self.runs.items():
            for order in line.orders:
                require_known(order, self.orders, f"runs.{name}: order")
            for seed in set(line.seeds).difference(self.seeds):
                known = ", ".join(map(str, self.seeds))
                raise InputError(f"runs.{name}: seed {seed} is unknown; the grid has {known}")


@dataclass(frozen=True)
class Cell:
    """One run of a grid: its folder's name, and what it is made with."""

    name: str
    overrides: tuple[str, ...]


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `mera-ds`."""
    parser = commands.add_parser(
        "study",
        help="compare methods: make and carry out a grid of runs",
        epilog="KEY=VALUE anywhere overrides a setting of all runs; execution.KEY=VALUE also one "
        "of runs that exist.",
    )
    parser.add_argument("grid", type=Path, help="YAML, e.g. benchmarks/study.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--order", help="only this order of the grid")
    parser.add_argument("--seed", type=int, help="only this seed of the grid")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and make nothing")
    parser.set_defaults(command=study, overrides=())


def study(arguments: argparse.Namespace) -> None:
    """Make the runs that don't exist, carry all out, and name those that failed.

    Raises:
        InputError: if the grid is wrong, or a run exists that was made otherwise.
        MeraError: behind the last run, if any failed; the others are finished.
    """
    grid = read_grid(arguments.grid)
    found = cells(grid, arguments.order, arguments.seed)
    execution = [text for text in arguments.overrides if text.startswith("execution.")]
    fixed = [text for text in arguments.overrides if text not in execution]
    configs = {cell.name: load_profile(grid.profile, [*cell.overrides, *fixed]) for cell in found}
    for cell in found:
        _require_same(arguments.out / cell.name, configs[cell.name])
        print(f"{arguments.out / cell.name}: {' '.join((*cell.overrides, *fixed))}")
    if arguments.dry_run:
        return
    set_up_console()
    for cell in found:
        folder = arguments.out / cell.name
        if not (folder / "config.yaml").exists():
            make_run(folder, grid.profile, [*cell.overrides, *fixed])
    _carry_out([arguments.out / cell.name for cell in found], execution)
    print(f"next: mera-ds report {arguments.out}/* --out {arguments.out}/report")


def read_grid(path: Path) -> Grid:
    """Read a grid's file.

    Raises:
        InputError: if it is missing or wrong.
    """
    grid = parse(Grid, read_yaml(path), str(path))
    if Path(grid.profile).suffix not in (".yaml", ".yml"):
        return grid
    return dataclasses.replace(grid, profile=str(path.parent / grid.profile))


def cells(grid: Grid, order: str | None = None, seed: int | None = None) -> list[Cell]:
    """Return the runs of a grid: for each seed and order all its lines, in the order of the file.

    Args:
        grid: the grid.
        order: only this one.
        seed: only this one.

    Raises:
        InputError: if the grid does not have that order or seed, or no line has it.
    """
    if order is not None:
        require_known(order, grid.orders, "--order")
    if seed is not None and seed not in grid.seeds:
        raise InputError(f"--seed {seed}: the grid has {', '.join(map(str, grid.seeds))}")
    found = [
        Cell(f"{name}-{place}-s{number}", _overrides(grid, line, place, number))
        for number in grid.seeds
        for place in grid.orders
        for name, line in grid.runs.items()
        if order in (None, place) and seed in (None, number)
        if place in (line.orders or grid.orders) and number in (line.seeds or grid.seeds)
    ]
    if not found:
        raise InputError("there is nothing to run: no line of the grid has that order and seed")
    name, count = Counter(cell.name for cell in found).most_common(1)[0]
    if count > 1:
        raise InputError(f"{count} runs of the grid would be called {name}; rename a line")
    return found


def _overrides(grid: Grid, line: GridRun, order: str, seed: int) -> tuple[str, ...]:
    settings = {**_dotted(grid.settings), **_dotted(line.settings)}
    modalities = ", ".join(grid.orders[order])
    return (
        f"method={line.method}",
        f"order=[{modalities}]",
        f"seed={seed}",
        *(f"{key}={json.dumps(value)}" for key, value in settings.items()),
    )


def _dotted(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key, so that a line changes only what it names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= _dotted(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _require_same(folder: Path, wanted: RunConfig) -> None:
    """Refuse a run of that name which computes something else."""
    if not (folder / "config.yaml").exists():
        return
    found = load_config(folder)
    if _computed(found) != _computed(wanted):
        raise InputError(
            f"{folder} was made with other settings than the grid gives it now; choose another "
            "--out, or delete that run"
        )


def _computed(config: RunConfig) -> dict[str, Any]:
    plain = dataclasses.replace(config, plugins=())
    return {key: value for key, value in dump(plain).items() if key != "execution"}


def _carry_out(folders: Sequence[Path], execution: Sequence[str]) -> None:
    """Carry out runs one after another; one that fails, however, does not stop the others."""
    from mera_ds.distributed import ensure_launcher_variables, process_group
    from mera_ds.sequence import open_run, run_plans

    runs = [open_run(folder, execution) for folder in folders]
    failed: list[str] = []
    longest = max(run.config.execution.timeout_seconds for run in runs)
    with process_group(ensure_launcher_variables(), longest):  # one for all, as in `run_plans`
        for number, run in enumerate(runs, start=1):
            logger.info("══ run %d of %d: %s", number, len(runs), run.folder)
            try:
                run_plans([run], share_with=folders)
            except Interrupted:
                raise
            except MeraError as error:
                failed.append(f"{run.folder}: {error}")
                logger.error("%s", failed[-1])
            except Exception as error:  # noqa: BLE001 - the other runs do not depend on this one
                failed.append(f"{run.folder}: {type(error).__name__}: {error}")
                logger.exception("%s", failed[-1])
    if failed:
        lines = "".join(f"\n  {line}" for line in failed)
        raise MeraError(
            f"{len(failed)} of {len(runs)} runs failed; the same command tries them again:{lines}"
        )
