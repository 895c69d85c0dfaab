"""What the processor is good at."""

import pathlib

import pytest
import torch

from mera_ds.hardware import fast_cpu_dtype


@pytest.mark.skipif(
    not hasattr(torch.cpu, "_is_avx512_bf16_supported"), reason="this torch does not tell"
)
def test_it_agrees_with_torch() -> None:
    if "avx512f" not in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").split():
        pytest.skip("torch tells it of x86-64 with AVX-512 only")
    assert fast_cpu_dtype() == ("bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32")
