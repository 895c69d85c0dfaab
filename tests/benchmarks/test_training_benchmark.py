"""The training benchmark runs at a tiny size; it asserts equal losses itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training.py"


@pytest.mark.slow
def test_it_writes_its_figures(tmp_path: Path) -> None:
    options = ["--small", "--repeats", "1"]
    places = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    subprocess.run([sys.executable, SCRIPT, *options, *places], check=True)
    (path,) = (tmp_path / "out").glob("training-*.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    figures = result["figures"]
    assert len(result["goals"]) == 17
    assert figures["V 4096"]["ours"]["losses"] == pytest.approx(figures["V 4096"]["HF"]["losses"])
    assert figures["loader"]["decoded"]["decoded"] == 16
    assert figures["loader"]["cached"]["decoded"] == 0
    assert figures["MSVD-like"]["shared"]["saved"] > figures["MSVD-like"]["packed"]["saved"] > 0
    assert "| figure | goal | measured |" in path.with_suffix(".md").read_text(encoding="utf-8")
