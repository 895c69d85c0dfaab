"""Memory and speed of the paper's model on one GPU, beside a LLaVA-style loop on HF's Trainer.

python benchmarks/gpu.py                  one GPU of 80 GB or more; under 10 minutes
python benchmarks/gpu.py --size small     the same code on anything, in seconds

The architecture is that of the profile a6000-fp16 (Llama-3-8B, LoRA of rank 128, CLIP-L, BEATs with
a Q-Former, Point-BERT) with random weights, so no file is needed. Every measurement is a process of
its own (at the small size they share one): one that fails is reported and the others go on. Results
are written as they come, to `benchmarks/results/gpu-<device>.{json,md}`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_sections import SECTIONS, write_weights
from gpu_tables import markdown

from mera_ds.machine import commit

MINUTES = 9.5


def device_name() -> str:
    """Return the GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{found[1] if found else 'CPU'}, no GPU"


def measure(section: str, size: str, weights: Path, seconds: float) -> dict[str, Any]:
    """Measure a section in a process of its own; what goes wrong is its result."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--size", size, "--section", section]
        command += ["--weights", str(weights), "--result", str(result)]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"error": f"not finished after {seconds:.0f} s"}
        if ended.returncode != 0 or not result.exists():
            lines = [line for line in ended.stderr.splitlines() if line.strip()]
            return {
                "error": lines[-1] if lines else f"status {ended.returncode}",
                "log": lines[-30:],
            }
        found: dict[str, Any] = json.loads(result.read_text())
    return {**found, "wall": time.perf_counter() - started}


def measure_here(section: str, size: str, weights: Path) -> dict[str, Any]:
    """Measure a section in this process; what goes wrong is its result."""
    try:
        return SECTIONS[section](size, weights)
    except Exception as error:  # noqa: BLE001  # whatever it is, the other sections go on
        return {"error": f"{type(error).__name__}: {error}"}


def write(out: Path, result: dict[str, Any]) -> None:
    """Write what is known so far."""
    out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    stem = out / f"gpu-{name}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(result))


def run_all(size: str, out: Path, only: list[str], minutes: float) -> dict[str, Any]:
    """Measure all sections while there is time."""
    deadline = time.monotonic() + 60 * minutes
    result: dict[str, Any] = {
        "device": device_name(),
        "size": size,
        "commit": commit(),
        "torch": torch.__version__,
        "sections": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder)
        write_weights(weights, size)
        for section in only or list(SECTIONS):
            left = deadline - time.monotonic()
            if left <= 0:
                found = {"error": "no time was left"}
            elif size == "small":
                found = measure_here(section, size, weights)
            else:
                found = measure(section, size, weights, left)
            result["sections"][section] = found
            write(out, result)
            print(f"{section}: {found.get('error', 'done')}", flush=True)
    return result


def main() -> None:
    """Measure everything, or (for its own use) one section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), default=[])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="start nothing after it")
    parser.add_argument("--section", choices=tuple(SECTIONS), help="for its own use")
    parser.add_argument("--weights", type=Path, help="for its own use")
    parser.add_argument("--result", type=Path, help="for its own use")
    arguments = parser.parse_args()
    if arguments.section:
        found = SECTIONS[arguments.section](arguments.size, arguments.weights)
        arguments.result.write_text(json.dumps(found))
        return
    if arguments.size == "full" and not torch.cuda.is_available():
        parser.error("there is no GPU; --size small runs the same code on a CPU")
    result = run_all(arguments.size, arguments.out, arguments.only, arguments.minutes)
    print(markdown(result))


if __name__ == "__main__":
    main()
