"""Lineages on disk that the tests of the merge start from."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mera_ds.checkpoint import NewDelta, load_delta, read_manifest, write_product
from mera_ds.merge.lineage import merge_product

SHAPES = {"net.mlp.up": (20, 30), "net.attn.q": (16, 12)}
RANK, SCALE = 3, 2.0


def random_delta(stage: int) -> NewDelta:
    """Return a delta of a stage with Fisher information."""
    generator = torch.Generator().manual_seed(stage)
    tensors, fisher = {}, {}
    for layer, (outputs, inputs) in SHAPES.items():
        tensors[f"{layer}.lora_A"] = torch.randn(RANK, inputs, generator=generator)
        tensors[f"{layer}.lora_B"] = stage * torch.randn(outputs, RANK, generator=generator)
        fisher[f"{layer}.rows"] = torch.rand(outputs, generator=generator)
        fisher[f"{layer}.columns"] = torch.rand(inputs, generator=generator)
    return NewDelta(
        stage=stage, modality=f"m{stage}", scale=SCALE, rank=RANK, tensors=tensors, fisher=fisher
    )


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Return the products `tuned1`, `merged1`, … of three stages merged by the moving average."""
    found: dict[str, Path] = {}
    previous = None
    for stage in (1, 2, 3):
        tuned, merged = (tmp_path / f"{kind}{stage}" for kind in ("tuned", "merged"))
        facts = {"key": f"k{stage}", "step": f"s{stage}", "base_sha256": "b"}
        connectors = {f"m{stage}": {"w": torch.full((2,), float(stage))}}
        write_product(
            tuned, **facts, previous=previous, connectors=connectors, delta=random_delta(stage)
        )
        merge_product(tuned, merged, key="k", step="s", stage=stage, coefficient=f"1/{stage}")
        found |= {tuned.name: tuned, merged.name: merged}
        previous = merged
    return found


def trained_deltas(product: Path, layer: str) -> list[Tensor]:
    """Return s · B A of every stage, dense, in fp64."""
    found = []
    for entry in read_manifest(product).lineage:
        tensors = load_delta(product, entry)
        left, right = (tensors[f"{layer}.lora_{factor}"].double() for factor in "BA")
        found.append(entry.scale * left @ right)
    return found
