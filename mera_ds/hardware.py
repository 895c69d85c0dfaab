"""What this machine's processor is good at. Imports no torch."""

from pathlib import Path
from typing import Literal

_CPU = Path("/proc/cpuinfo")
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Instructions of x86-64 and Arm that multiply bf16 in hardware; without them fp32 is faster."""


def fast_cpu_dtype() -> Literal["fp32", "bf16"]:
    """Return bf16 where the processor multiplies it in hardware, and fp32 everywhere else."""
    try:
        words = _CPU.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return "fp32"
    return "fp32" if _BF16_FLAGS.isdisjoint(words) else "bf16"
