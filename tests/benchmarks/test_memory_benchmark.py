"""The benchmark of the memory estimate, at a size where Python itself is most of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.mark.slow
def test_a_small_training_takes_about_what_is_estimated(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SCRIPT, "--smallest", "--out", tmp_path], check=True)
    (row,) = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert abs(row["error"]) < 0.2
    assert "| tune | 256 × 2 |" in (tmp_path / "memory.md").read_text()
