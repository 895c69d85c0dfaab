"""The commands `mera-ds lineage show | reweight | undo | export`."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mera_ds.config import RunConfig, load_config
from mera_ds.errors import InputError
from mera_ds.files import folder_lock, sha256_json
from mera_ds.manifest import (
    MANIFEST,
    DeltaEntry,
    Manifest,
    check_chain,
    check_lineage,
    is_finished,
    read_manifest,
    require_deltas,
    require_foldable,
)
from mera_ds.plan import load_plan, stage_folder
from mera_ds.settings import apply_overrides, require_known

if TYPE_CHECKING:  # they need torch
    from mera_ds.merge.methods import Method

VARIANT = "reweighted"
"""How the folders of re-weighted models begin."""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to the parser of `mera-ds`."""
    group = commands.add_parser(
        "lineage", help="look at a model's deltas, change your mind, export"
    )
    kinds = group.add_subparsers(required=True, metavar="COMMAND")
    shown = kinds.add_parser("show", help="base, deltas and coefficients of a model")
    add_model_arguments(shown, show)

    changed = kinds.add_parser(
        "reweight",
        help="another model with other coefficients; no weight is touched",
        epilog="MODALITY=COEFFICIENT sets coefficients, e.g. image=1 video=1/3; with --method, "
        "OPTION=VALUE sets the method's options.",
    )
    add_model_arguments(changed, reweight)
    changed.add_argument("--method", help="merge all stages anew by this method instead")
    changed.add_argument("--as", dest="name", help="name of the new model; default: a hash")
    changed.set_defaults(overrides=())

    undone = kinds.add_parser("undo", help="the model before the newest stage")
    add_model_arguments(undone, undo)

    exported = kinds.add_parser(
        "export",
        help="an HF folder, or one PEFT adapter",
        epilog="With --method, OPTION=VALUE sets the method's options.",
    )
    add_model_arguments(exported, export)
    exported.add_argument("--out", type=Path, required=True, help="folder to write")
    exported.add_argument(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        help="default: the base's; of an adapter's factors: fp32",
    )
    exported.add_argument("--method", help="merge all stages anew by this method before")
    exported.add_argument("--adapter", action="store_true", help="write a PEFT adapter instead")
    exported.add_argument("--rank", type=int, help="compress the adapter to this rank")
    exported.set_defaults(overrides=())


def add_model_arguments(parser: argparse.ArgumentParser, command: Any) -> None:
    """Let a command name the model that it is about."""
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--modality", help="stage of the model; default: the newest finished one")
    parser.add_argument("--stage", type=int, help="the same by number")
    parser.add_argument(
        "--model", help="another model of the stage, e.g. tuned, merged, or a re-weighted one"
    )
    parser.set_defaults(command=command)


@dataclass(frozen=True)
class Chosen:
    """The model that a command is about."""

    run: Path
    config: RunConfig
    stage: int
    modality: str
    product: Path
    manifest: Manifest

    @property
    def folder(self) -> Path:
        """The folder of its stage."""
        return self.product.parent


def choose(arguments: argparse.Namespace) -> Chosen:
    """Return the model that the arguments name.

    Raises:
        InputError: if the run, the stage or the model doesn't exist, the run has none yet, or the
            command needs a sum of deltas and the model is none.
    """
    run: Path = arguments.run
    config = load_config(run)
    stage = _stage_of(run, config, arguments)
    modality = config.order[stage - 1]
    folder = run / stage_folder(stage, modality)
    name = arguments.model or Path(load_plan(run / "plan.json").final_model(modality)).name
    names = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    if name not in names:
        found = ", ".join(names) or "none"
        raise InputError(f"{folder} has no finished model '{name}'; finished: {found}")
    manifest = read_manifest(folder / name)
    check_chain(folder / name, manifest)
    if arguments.command is not show:
        require_foldable(folder / name, manifest)
    return Chosen(run, config, stage, modality, folder / name, manifest)


def _stage_of(run: Path, config: RunConfig, arguments: argparse.Namespace) -> int:
    if arguments.modality is not None:
        require_known(arguments.modality, config.order, "--modality")
        return config.order.index(arguments.modality) + 1
    if arguments.stage is not None:
        if not 1 <= arguments.stage <= len(config.order):
            raise InputError(f"--stage is {arguments.stage}; this run has {len(config.order)}")
        return int(arguments.stage)
    plan = load_plan(run / "plan.json")
    done = [
        stage
        for stage, modality in enumerate(config.order, start=1)
        if (run / plan.final_model(modality) / MANIFEST).exists()
    ]
    if not done:
        raise InputError(f"{run} has no finished stage yet; run 'mera-ds run {run}' first")
    return done[-1]


def show(arguments: argparse.Namespace) -> None:
    """Print the lineage of a model."""
    chosen = choose(arguments)
    manifest = chosen.manifest
    print(f"{chosen.product}: model {manifest.model_sha256[:12]}, made by {manifest.step}")
    made_of = "+ Σ c·s·BA" if manifest.backbone is None else "tuned as a whole"
    print(
        f"  backbone {manifest.backbone_sha256[:12]} = base {manifest.base_sha256[:12]} {made_of}"
    )
    _show_full(chosen)
    if manifest.lineage:
        print("  stage  modality      coefficient    scale   rank       size  trained on")
    for entry in manifest.lineage:
        size = sum((chosen.product / file).stat().st_size for file in entry.files)
        print(
            f"  {entry.stage:5d}  {entry.modality:12s}  {_coefficient(entry):13s}"
            f"{entry.scale:7g}{entry.rank:7d}  {size / 1e6:6.2f} MB  {entry.parent[:12]}"
            f"{'  (factors of a merge method)' if entry.trained is not None else ''}"
        )
    for modality, file in manifest.connectors.items():
        size = (chosen.product / file.file).stat().st_size
        print(f"  connector {modality}: {size / 1e6:.2f} MB, {file.sha256[:12]}")


def _show_full(chosen: Chosen) -> None:
    """Print how a backbone that was tuned as a whole came about."""
    full = chosen.manifest.backbone
    if full is None:
        return
    for stage in full.stages:
        print(
            f"  stage {stage.stage} ({stage.modality}): tuned from {stage.parent[:12]}, "
            f"counted {stage.coefficient}"
        )
    size = sum((chosen.product / entry.file).stat().st_size for entry in full.files)
    print(f"  full backbone: {size / 1e6:.2f} MB")


def _coefficient(entry: DeltaEntry) -> str:
    """Return a coefficient as printed; a range where layers have their own."""
    values = [float(Fraction(text)) for text in (entry.coefficient, *entry.layers.values())]
    if len(set(values)) > 1:
        return f"{min(values):.3g}…{max(values):.3g}"
    return entry.coefficient if len(entry.coefficient) < 12 else f"{values[0]:.6g}"


def reweight(arguments: argparse.Namespace) -> None:
    """Write a model with other coefficients beside the one it is made from."""
    chosen = choose(arguments)
    require_deltas(chosen.product, chosen.manifest)
    change, facts = _change(arguments)
    from mera_ds.merge.lineage import reweight_product

    if not change:
        names = ", ".join(entry.modality for entry in chosen.manifest.lineage)
        raise InputError(f"nothing to change: give MODALITY=COEFFICIENT ({names}) or --method")
    key = sha256_json({"kind": "reweight", "start": _identity(chosen), **facts})
    name = _variant(arguments.name or key[:8])
    output = chosen.folder / name
    with folder_lock(chosen.run):
        if is_finished(output, key):
            print(f"{output} is finished")
            return
        manifest = reweight_product(
            chosen.product, output, key=key, step=f"{chosen.folder.name}/{name}", change=change
        )
    _print_warning(change)
    _print_error(manifest.provenance.get("relative_error"))
    _print_made(chosen, output)


def _variant(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+", name):
        raise InputError(f"--as {name}: use letters, digits, '.', '_' and '-'")
    return f"{VARIANT}-{name}"


def _identity(chosen: Chosen) -> list[str]:
    return [chosen.manifest.key, chosen.manifest.model_sha256]


def _change(arguments: argparse.Namespace) -> tuple["dict[str, str] | Method", dict[str, Any]]:
    """Return what the arguments ask for, and the same as data."""
    if arguments.method is None:
        pairs = dict(text.split("=", 1) for text in arguments.overrides)
        return pairs, {"coefficients": pairs}
    method = _method(arguments)
    return method, {"method": method.name, "options": apply_overrides({}, arguments.overrides)}


def _method(arguments: argparse.Namespace) -> "Method":
    from mera_ds.merge.methods import open_method

    return open_method(arguments.method, apply_overrides({}, arguments.overrides))


def _print_warning(change: "dict[str, str] | Method") -> None:
    if not isinstance(change, dict) and change.kind.warning is not None:
        print(f"warning: {change.kind.warning}")


def _print_error(error: float | None) -> None:
    if error is not None:
        print(
            f"the method's result is dense; its factors miss {100 * error:.3g} % of it (option "
            "rank=…). 'mera-ds lineage export --method …' writes it exactly"
        )


def _print_made(chosen: Chosen, output: Path) -> None:
    print(f"{output}: made from {chosen.product.name}; its connectors are as they were there")
    print(f"look at it:  mera-ds lineage show {chosen.run} {_place(chosen, output.name)}")
    print(f"evaluate it: python launch/score.py --run {chosen.run} {_place(chosen, output.name)}")


def _place(chosen: Chosen, model: str) -> str:
    return f"--modality {chosen.modality} --model {model}"


def undo(arguments: argparse.Namespace) -> None:
    """Write the model before the newest stage."""
    chosen = choose(arguments)
    require_deltas(chosen.product, chosen.manifest)
    from mera_ds.merge.lineage import undo_product

    key = sha256_json({"kind": "undo", "start": _identity(chosen)})
    output = chosen.folder / "undone"
    with folder_lock(chosen.run):
        if is_finished(output, key):
            print(f"{output} is finished")
            return
        manifest = undo_product(
            chosen.product,
            output,
            key=key,
            step=f"{chosen.folder.name}/undone",
            parents=_earlier_products(chosen),
        )
    names = ", ".join(entry.modality for entry in manifest.lineage)
    print(f"{output}: {names}, backbone {manifest.backbone_sha256[:12]}")
    print(f"nothing was removed; {chosen.product} is as it was")


def _earlier_products(chosen: Chosen) -> list[Path]:
    """Return the finished models of earlier stages, the newest stage's final model first."""
    order = chosen.config.order
    plan = load_plan(chosen.run / "plan.json")
    products = []
    for stage in range(chosen.stage - 1, 0, -1):
        folder = chosen.run / stage_folder(stage, order[stage - 1])
        final = chosen.run / plan.final_model(order[stage - 1])
        others = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
        products += [final, *(path for path in others if path != final)]
    return [path for path in products if (path / MANIFEST).exists()]


def export(arguments: argparse.Namespace) -> None:
    """Write a model as an HF folder or as one PEFT adapter."""
    if arguments.adapter and arguments.method:
        raise InputError("--adapter holds the lineage as it stands: leave out --method")
    if arguments.rank is not None and (not arguments.adapter or arguments.rank < 1):
        raise InputError("--rank is the adapter's, and at least 1: give --adapter")
    chosen = choose(arguments)
    if arguments.adapter or arguments.method:
        require_deltas(chosen.product, chosen.manifest)
    from mera_ds.identity import backbone_folder, base_sha256
    from mera_ds.merge.export import export_folder
    from mera_ds.merge.lineage_adapter import export_adapter

    base = backbone_folder(chosen.config, chosen.run, chosen.product)
    check_lineage(chosen.product, chosen.manifest, base_sha256(chosen.config, chosen.run))
    model: Sequence[Any] = (base, chosen.product, chosen.manifest, arguments.out)
    if arguments.adapter:
        dtype = arguments.dtype or "fp32"
        adapter = export_adapter(*model, rank=arguments.rank, dtype=dtype)
        print(f"{arguments.out}: PEFT adapter of rank {adapter.rank} for {base}")
        print(f"  missing of the update: {100 * adapter.relative:.3g} %")
        return
    method = None if arguments.method is None else _method(arguments)
    if method is not None:
        _print_warning(method)
    found = export_folder(*model, dtype=arguments.dtype, method=method)
    print(f"{arguments.out}: HF folder, {found.changed} tensors changed, connectors beside them")
    print(f"  rounding, relative to the update: {100 * found.relative:.3g} %")
