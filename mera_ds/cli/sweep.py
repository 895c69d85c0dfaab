"""The command `mera-ds merge-sweep`."""

import argparse
import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from mera_ds.cli.lineage import Chosen, add_model_arguments, choose
from mera_ds.errors import InputError
from mera_ds.evaluate import pareto
from mera_ds.files import write_bytes, write_json
from mera_ds.manifest import require_deltas

if TYPE_CHECKING:  # it needs torch
    from mera_ds.evaluate.sweep import Candidate

METHODS = ("scale", "slerp", "task-arithmetic", "opcm", "swudi")
DENSE = ("ties", "dare", "magmax")


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `mera-ds`."""
    parser = commands.add_parser(
        "merge-sweep", help="try coefficients and methods on a small validation set"
    )
    add_model_arguments(parser, merge_sweep)
    parser.add_argument("--samples", type=int, default=64, help="texts per modality")
    parser.add_argument("--dense", action="store_true", help="try ties, dare and magmax, too")
    parser.add_argument("--out", type=Path, help="picture; default <stage>/sweep/pareto.png")


def merge_sweep(arguments: argparse.Namespace) -> None:
    """Print and plot old against new for some ways of merging; name the best and its command."""
    if arguments.samples < 1:
        raise InputError(f"--samples is {arguments.samples}; it must be at least 1")
    chosen = choose(arguments)
    require_deltas(chosen.product, chosen.manifest)
    from mera_ds.distributed import ensure_launcher_variables, process_group
    from mera_ds.evaluate.sweep import sweep
    from mera_ds.log import set_up_console
    from mera_ds.report.pareto import pareto_figure

    set_up_console()
    world = ensure_launcher_variables()
    with process_group(world, chosen.config.execution.timeout_seconds):
        points = sweep(
            chosen.run,
            chosen.config,
            chosen.product,
            chosen.manifest,
            candidates(chosen, METHODS + (DENSE if arguments.dense else ())),
            arguments.samples,
            world,
        )
    best = pareto.choose(points)
    picture = arguments.out or chosen.folder / "sweep" / "pareto.png"
    title = f"{chosen.run.resolve().name}, stage {chosen.stage} ({chosen.modality})"
    write_bytes(picture, pareto_figure(points, best, title))
    facts = {"schema": 1, "model": chosen.manifest.model_sha256, "samples": arguments.samples}
    rows = [dataclasses.asdict(point) for point in points]
    write_json(picture.with_suffix(".json"), {**facts, "points": rows})
    _print(chosen, points, best, arguments.samples)
    print(f"picture: {picture}")


def candidates(chosen: Chosen, methods: Sequence[str]) -> "list[Candidate]":
    """Return the model as it stands, a row of coefficients for the newest delta, and methods."""
    from mera_ds.evaluate.sweep import Candidate
    from mera_ds.merge.methods import open_method

    stages = len(chosen.manifest.lineage)
    values = {Fraction(0), Fraction(1, 2 * stages), Fraction(1, stages), Fraction(1, 2)}
    values |= {Fraction(3, 4), Fraction(1)}
    found = [Candidate("as it stands", None, {})]
    for value in sorted(values):
        change = {chosen.modality: str(value)}
        text = f"{chosen.modality}={value}"
        found.append(Candidate(text, text, change))
    if all(entry.fisher is not None for entry in chosen.manifest.lineage):
        methods = (*methods, "fisher")
    for name in methods:
        found.append(Candidate(name, f"--method {name}", open_method(name, {})))
    return found


def _print(
    chosen: Chosen, points: Sequence[pareto.Point], best: pareto.Point, samples: int
) -> None:
    names = list(best.losses)
    print(
        f"{chosen.product}: mean loss per token on {samples} texts a modality, drawn by seed from "
        "the training shards without the replay list (no test set)"
    )
    print(f"  {'':18s}{''.join(f'{name:>12s}' for name in names)}{'old':>10s}{'all':>10s}  front")
    best_points = pareto.front(points)
    for point in points:
        losses = "".join(f"{value:12.4f}" for value in point.losses.values())
        mark = "  *" if point in best_points else ""
        print(f"  {point.name:18s}{losses}{point.old:10.4f}{point.mean:10.4f}{mark}")
    print(f"chosen: {best.name}, the smallest mean loss over all modalities")
    if best.arguments is not None:
        place = f"--modality {chosen.modality} --model {chosen.product.name}"
        print(f"apply it: mera-ds lineage reweight {chosen.run} {place} {best.arguments}")
