"""What computed a result: hardware and commit, as one line each. Imports no torch."""

import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

import psutil

from mera_ds import __version__

SECONDS = 20
"""How long `nvidia-smi` or `git` may take."""


def gpu_names() -> list[str]:
    """Return name and memory of each GPU, as the driver tells."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    return [line.strip() for line in _output(query).splitlines() if line.strip()]


@cache
def hardware() -> str:
    """Return this machine in words, e.g. `2 cores AMD EPYC 7B13, 25 GB, no GPU`."""
    gpus = gpu_names()
    named = [f"{gpus.count(name)} × {name}" for name in dict.fromkeys(gpus)]
    memory = psutil.virtual_memory().total / 1e9
    cores = f"{psutil.cpu_count() or 1} cores {_processor()}"
    return f"{cores}, {memory:.0f} GB, {', '.join(named) if named else 'no GPU'}"


@cache
def commit() -> str:
    """Return the commit of this code, marked if files were changed; without git, its version."""
    folder = str(Path(__file__).parent)
    described = _output(["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"])
    return described.strip() or f"version {__version__}"


def _processor() -> str:
    """Return the processor's name, as Linux gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _output(command: list[str]) -> str:
    """Return what a program prints; nothing if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
    except (subprocess.SubprocessError, OSError):
        return ""
    return ended.stdout
