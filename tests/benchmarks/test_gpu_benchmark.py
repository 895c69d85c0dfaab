"""The GPU benchmark runs at its small size on a CPU; it compares losses itself."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
NEEDS_BITSANDBYTES = "24g"


@pytest.mark.slow
def test_every_section_is_measured(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SCRIPT, "--size", "small", "--out", tmp_path], check=True)
    (path,) = tmp_path.glob("gpu-*.json")
    sections = json.loads(path.read_text())["sections"]
    errors = {name: found["error"] for name, found in sections.items() if "error" in found}
    if importlib.util.find_spec("bitsandbytes") is None:
        assert "bitsandbytes" in errors.pop(NEEDS_BITSANDBYTES)
    assert errors == {}
    text = path.with_suffix(".md").read_text()
    assert text.count("| ≤ ") + text.count("| ≥ ") == 11
    missing = [line for line in text.splitlines() if "not measured" in line]
    assert all(NEEDS_BITSANDBYTES in line for line in missing)
