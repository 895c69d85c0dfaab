"""The benchmark of merging runs to its end on a small size, peers left out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_small_and_without_peers(tmp_path: Path) -> None:
    command = [
        *(sys.executable, str(ROOT / "benchmarks/merge.py"), "--no-peers", "--repeats", "1"),
        *("--gigabytes", "0.01", "--hidden", "256", "--memory-sizes", "0.02"),
        *("--work", str(tmp_path / "work"), "--disk", str(tmp_path / "disk")),
        *("--results", str(tmp_path / "results")),
    ]
    subprocess.run(command, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    results = json.loads((tmp_path / "results/merge.json").read_text())
    ours = {"ours", "ours, base + adapter", "ours, dry run"}
    assert results["table"].keys() == {"copy, 2 threads", *ours}
    assert results["delta_8b"]["model_fp16"] == pytest.approx(16.06, abs=0.005)
    assert all(min(parts.values()) > 0 for parts in results["limits"].values())
    assert results["accuracy"]["two checkpoints"]["ours"]["largest_error_ulp"] <= 0.51
    assert next(iter(results["memory"].values())) < 0.35
    assert (tmp_path / "results/merge-memory.png").stat().st_size > 1000
    assert "| ours |" in (tmp_path / "results/merge.md").read_text()
    assert not (tmp_path / "work").exists()
