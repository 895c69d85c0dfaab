"""How many parameters a run trains and adds, from the headers of its products' files."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mera_ds.manifest import MANIFEST, Manifest, read_manifest
from mera_ds.merge.safetensors_io import read_header
from mera_ds.plan import MergeStep, TrainStep, connector_set, load_plan
from mera_ds.report.results import Run


@dataclass(frozen=True)
class Parameters:
    """Counts of parameters; None: no product of that kind is there.

    A connector counts as its file does: with the fixed statistics of `norm: data`.
    """

    trained: int | None
    """Most that one training step of the run trains."""
    added: int | None
    """What the newest model has beside base and encoders: connectors, and deltas if woven (all
    others fold into the base)."""


def run_parameters(run: Run) -> Parameters:
    """Return the counts of a run.

    Raises:
        DataError: if a file of a product is damaged.
    """
    path = run.folder / "plan.json"
    trained = []
    newest = None
    for step in load_plan(path).steps if path.exists() else ():
        makes_a_model = isinstance(step, TrainStep | MergeStep)
        if not makes_a_model or not (run.folder / step.output / MANIFEST).exists():
            continue
        newest = run.folder / step.output
        if isinstance(step, TrainStep):
            trained.append(_count(newest, _trained_files(step, read_manifest(newest))))
    return Parameters(
        trained=max(trained, default=None),
        added=None if newest is None else _count(newest, _added_files(read_manifest(newest))),
    )


def _trained_files(step: TrainStep, manifest: Manifest) -> list[str]:
    connectors = {connector_set(name): entry.file for name, entry in manifest.connectors.items()}
    files = [connectors[name] for name in step.trainable if name in connectors]
    if len(files) == len(step.trainable):
        return files
    if manifest.backbone is not None:
        return files + [entry.file for entry in manifest.backbone.files]
    deltas = [entry.as_trained.file for entry in manifest.lineage[-1:]]
    return [*files, *deltas, *_weave(manifest)]


def _added_files(manifest: Manifest) -> list[str]:
    files = [entry.file for entry in manifest.connectors.values()]
    if manifest.weave is not None:
        files += [*(entry.file for entry in manifest.lineage), *_weave(manifest)]
    return files


def _weave(manifest: Manifest) -> list[str]:
    return [] if manifest.weave is None else [manifest.weave.file]


def _count(product: Path, files: Iterable[str]) -> int:
    weights = [product / name for name in files if name.endswith(".safetensors")]
    return sum(place.elements for path in weights for place in read_header(path).values())
