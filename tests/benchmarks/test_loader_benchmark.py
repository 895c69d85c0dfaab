"""The loader benchmark runs at a tiny size; it asserts equal samples itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "loader.py"


@pytest.mark.slow
def test_it_writes_its_figures(tmp_path: Path) -> None:
    options = ["--images", "20", "--clips", "1", "--repeats", "1"]
    places = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    subprocess.run([sys.executable, SCRIPT, *options, *places], check=True)
    (path,) = (tmp_path / "out").glob("loader-*.json")
    result = json.loads(path.read_text())
    assert len(result["ratios"]) == 5
    assert result["figures"]["video"]["ours"]["samples"] == 40
    assert "| goal |" in path.with_suffix(".md").read_text()
