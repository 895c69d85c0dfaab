"""The arithmetic of a merge: one rounding, frozen tensors bit for bit, any number of threads."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mera_ds.errors import DataError
from mera_ds.merge import digest, stream
from mera_ds.merge.state_dicts import carry_out, merge_checkpoints, prepare_merge

from .models import bare_checkpoint, contents, state

NAN_PAYLOAD = -0x1235
"""int16 bits of a half-precision NaN with a payload, in both half dtypes."""


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks and spans small, so that small tensors have many."""
    monkeypatch.setattr(digest, "BLOCK", 4096)
    monkeypatch.setattr(stream, "SPAN", 1024)


def merged(
    tmp_path: Path, old: Tensor, new: Tensor, stage: int, dtype: str | None = None
) -> Tensor:
    """Return the merge of two checkpoints of one tensor."""
    previous = bare_checkpoint(tmp_path / "previous", w=old)
    tuned = bare_checkpoint(tmp_path / "tuned", w=new)
    return state(merge_checkpoints(previous, tuned, stage, tmp_path / "out", dtype=dtype))["w"]


def noise(seed: int, dtype: torch.dtype, size: int = 50_000) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("stage", [2, 3, 4, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.usefixtures("small_blocks")
def test_the_average_is_rounded_once(tmp_path: Path, stage: int, dtype: torch.dtype) -> None:
    old, new = noise(1, dtype), noise(2, dtype)
    exact = old.double() * (stage - 1) / stage + new.double() / stage
    found = merged(tmp_path, old, new, stage)
    assert found.dtype == dtype
    limits = torch.finfo(dtype)
    half_unit = limits.eps / 2 * 2.0 ** (torch.frexp(exact).exponent - 1)
    half_unit = half_unit.clamp(min=limits.smallest_normal * limits.eps / 2)
    arithmetic = 2.0**-50 if dtype == torch.float32 else 2.0**-22
    bound = half_unit + arithmetic * (old.double().abs() + new.double().abs())
    assert bool(((found.double() - exact).abs() <= bound).all())
    naive = (old * ((stage - 1) / stage) + new / stage).double()
    sharp = not bool(((naive - exact).abs() <= bound).all())
    assert sharp or stage == 2, "halves are exact, all else would show a second rounding"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stage", [1, 2, 3, 7])
def test_a_frozen_tensor_comes_out_bit_identical(
    tmp_path: Path, dtype: torch.dtype, stage: int
) -> None:
    """Negative zeros and the payloads of NaNs included."""
    old = noise(0, dtype, 10_000)
    old[:100] = -0.0
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    old.view(bits)[100:200] = NAN_PAYLOAD
    found = merged(tmp_path, old, old.clone(), stage)
    assert torch.equal(found.view(bits), old.view(bits))


@pytest.mark.parametrize("stage", [2, 3, 5])
def test_elements_that_did_not_change_keep_their_value(tmp_path: Path, stage: int) -> None:
    old = noise(3, torch.float16)
    new = old.clone()
    new[::7] += 1
    kept = torch.arange(len(old)) % 7 != 0
    assert torch.equal(merged(tmp_path, old, new, stage)[kept], old[kept])


def test_stage_one_is_the_tuned_tensor_bit_for_bit(tmp_path: Path) -> None:
    new = noise(4, torch.float16)
    new[:10] = -0.0
    found = merged(tmp_path, 60_000 * noise(5, torch.float16).sign(), new, 1)
    assert torch.equal(found.view(torch.int16), new.view(torch.int16))


def test_the_dtype_can_be_chosen(tmp_path: Path) -> None:
    old, new = torch.zeros(4, dtype=torch.bfloat16), torch.ones(4)
    found = merged(tmp_path, old, new, 4, dtype="F16")
    assert found.tolist() == [0.25] * 4
    assert found.dtype == torch.float16


@pytest.mark.parametrize(("stage", "bad"), [(1, float("inf")), (2, float("nan"))])
def test_what_is_not_finite_is_refused(tmp_path: Path, stage: int, bad: float) -> None:
    new = noise(6, torch.float16)
    new[777] = bad
    with pytest.raises(DataError, match=r"the merge of 'w' is not finite in F16; look at .*tuned"):
        merged(tmp_path, noise(7, torch.float16), new, stage)


def test_what_the_dtype_can_not_hold_is_refused(tmp_path: Path) -> None:
    old, new = noise(8, torch.bfloat16), noise(9, torch.bfloat16)
    new[5] = 1e6
    with pytest.raises(DataError, match=r"not finite in F16; .*choose another --dtype"):
        merged(tmp_path, old, new, 2, dtype="F16")


def test_large_values_are_no_error(tmp_path: Path) -> None:
    """Their squares are infinite in fp32, they are not."""
    old, new = noise(8, torch.bfloat16) * 1e30, noise(9, torch.bfloat16) * 1e30
    assert bool(torch.isfinite(merged(tmp_path, old, new, 2)).all())


@pytest.mark.usefixtures("small_blocks")
def test_any_number_of_threads_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors = [
        {f"t{n}": noise(10 * s + n, torch.float16, 9000 + n) for n in range(9)} for s in (0, 1)
    ]
    previous = bare_checkpoint(tmp_path / "previous", **tensors[0])
    tuned = bare_checkpoint(tmp_path / "tuned", **tensors[1])
    found = []
    for workers in (1, 2, 5):
        output = tmp_path / f"out{workers}"
        carry_out(
            prepare_merge(previous, tuned, 3, output, shard_size=40_000), output, workers=workers
        )
        found.append(contents(output))
    assert found[0] == found[1] == found[2]
    assert len([name for name in found[0] if name.endswith(".safetensors")]) == 5


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    previous = bare_checkpoint(tmp_path / "a", s=torch.tensor(1.0), e=torch.zeros(0, 4))
    tuned = bare_checkpoint(tmp_path / "b", s=torch.tensor(4.0), e=torch.zeros(0, 4))
    found = state(merge_checkpoints(previous, tuned, 3, tmp_path / "out"))
    assert float(found["s"]) == 2.0
    assert found["e"].shape == (0, 4)
