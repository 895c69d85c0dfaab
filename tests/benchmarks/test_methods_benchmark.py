"""The benchmark of the methods runs to its end on a small size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_small(tmp_path: Path) -> None:
    command = [
        *(sys.executable, str(ROOT / "benchmarks/methods.py"), "--hidden", "64", "--layers", "1"),
        *("--tokens", "16", "--repeats", "1", "--device", "cpu", "--results", str(tmp_path)),
    ]
    subprocess.run(command, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    results = json.loads((tmp_path / "methods.json").read_text())
    assert results["training step / plain LoRA"].keys() == {"lora", "ewc", "pathweave"}
    assert results["prefill / plain LoRA"].keys() == {"merged", "lora", "pathweave"}
    assert "| one token / plain LoRA | pathweave |" in (tmp_path / "methods.md").read_text()
