"""A run that merges by Fisher information measured on data, as a user starts it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mera_ds.checkpoint import load_tensors, read_manifest
from mera_ds.cli import main
from mera_ds.train.penalty import load_importance

SETTINGS = (
    *("method=mera", "order=[image, audio]", "align.max_steps=2", "tune.max_steps=3"),
    *("merge.method=fisher", "merge.fisher=data", "merge.fisher_percent=5"),
)


@pytest.mark.slow
def test_a_run_measures_keeps_and_uses_it(make_tiny_run: Callable[..., Path]) -> None:
    run = make_tiny_run(*SETTINGS)
    assert main(["run", str(run), "--until", "02-audio/merge"]) == 0
    merged = run / "stages/02-audio/merged"
    lineage = read_manifest(merged).lineage
    for entry in lineage:
        assert entry.measured is not None
        assert entry.fisher is not None
        kept = load_tensors(merged / entry.measured.file, entry.measured.sha256)
        free = load_tensors(merged / entry.fisher.file, entry.fisher.sha256)
        assert kept.keys() == free.keys()
        assert any(not torch.equal(kept[name], free[name]) for name in kept)
    squares = load_importance(run / "stages/02-audio/fisher")
    assert all(bool((entry >= 0).all()) for entry in squares.values())
    assert any(bool(entry.any()) for entry in squares.values())
    assert 0 < float(lineage[-1].coefficient) < 1
