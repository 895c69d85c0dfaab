"""Full fine-tuning: the same training as plain torch, and states and weights that no rank holds."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mera_ds.distributed import World, process_group
from mera_ds.errors import DataError
from mera_ds.files import FAILPOINT_VARIABLE, sha256_file
from mera_ds.train import shares
from mera_ds.train.full import write_backbone
from mera_ds.train.shares import SharedFiles, SharedTensor, write_shares

from .problem import (
    Task,
    Trained,
    losses,
    prepare,
    train_all,
    train_plainly,
    trainee,
    whole_change,
    worst_loss,
    worst_moment,
)
from .processes import run_ranks, train_command

pytestmark = pytest.mark.slow

ALONE = World(rank=0, size=1, local_rank=0)
POISONED = (1,)
SMALL = 150_000
"""Bytes per file; the tiny backbone has six times as much in fp32."""


def _full(run: Path, zero: int, dtype: str = "fp32", poisoned: tuple[int, ...] = ()) -> Task:
    task = Task(run, full=True, dtype=dtype, poisoned=poisoned).training(max_steps=3)
    return task.using(zero=zero, micro_batch_size=2)


@pytest.fixture(scope="module")
def two_ranks(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained | str]:
    """Return every case, trained on two ranks."""
    exact = {f"fp32-{zero}": _full(run, zero) for zero in (1, 3)}
    poisoned = {"fp16-3": _full(run, 3, "fp16", POISONED)}
    folder = tmp_path_factory.mktemp("full")
    results: dict[str, Trained | str] = run_ranks(train_all, 2, exact | poisoned, folder)[0]
    return results


@pytest.mark.parametrize("zero", [1, 3])
def test_it_trains_as_plain_torch(zero: int, run: Path, two_ranks: dict[str, Trained]) -> None:
    found, expected = two_ranks[f"fp32-{zero}"], train_plainly(_full(run, zero))
    assert isinstance(found, Trained), found
    assert worst_loss(found, expected) < 1e-6
    assert worst_moment(found, expected) < 1e-3
    assert whole_change(found, expected) < 2e-4
    weights = [name for name in found.parameters if name.startswith("backbone/")]
    assert len(weights) == len(found.parameters) - 4
    assert "backbone/model.embed_tokens.weight" in weights


def test_a_poisoned_step_never_reaches_the_weights_in_fp16(
    run: Path, two_ranks: dict[str, Trained]
) -> None:
    found = two_ranks["fp16-3"]
    assert isinstance(found, Trained), found
    assert set(POISONED) <= set(found.skipped)
    (line,) = (entry for entry in found.log if "loss nan or its gradient is not finite" in entry)
    assert line.startswith("step 1: ")
    assert "image/image-" in line
    expected = train_plainly(_full(run, 3), skip=found.skipped)
    assert whole_change(found, expected) < 0.2


def _write(run: Path, zero: int, dtype: str, folder: Path) -> None:
    """Write an untrained backbone, in many small files."""
    shares.SHARE_BYTES = SMALL
    world = prepare()
    with (
        process_group(world, timeout_seconds=60),
        trainee(_full(run, zero, dtype), world) as (engine, _),
    ):
        write_backbone(engine, run / "backbone", folder, dtype, world)


def test_any_ranks_write_the_same_bytes(run: Path, tmp_path: Path) -> None:
    run_ranks(_write, 2, run, 3, "bf16", tmp_path / "two")
    run_ranks(_write, 1, run, 1, "bf16", tmp_path / "one")
    written = [
        {path.name: sha256_file(path) for path in (tmp_path / name).iterdir()}
        for name in ("two", "one")
    ]
    assert written[0] == written[1]
    assert len([name for name in written[0] if name.endswith(".safetensors")]) > 3
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "two").state_dict()
    base = AutoModelForCausalLM.from_pretrained(run / "backbone").state_dict()
    assert found.keys() == base.keys()
    for name, tensor in base.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name


def test_no_more_than_two_tensors_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "SHARE_BYTES", 100)
    alive: set[int] = set()
    most = 0

    class Counted(torch.Tensor):
        def __del__(self) -> None:
            alive.discard(id(self))

    def gather() -> torch.Tensor:
        nonlocal most
        value = torch.ones(10).as_subclass(Counted)
        alive.add(id(value))
        most = max(most, len(alive))
        return value

    written = write_shares(tmp_path, "x", _tensors(gather), "fp32", ALONE)
    assert len(written) == 6
    assert 1 <= most <= 2


def _tensors(gather: Callable[[], torch.Tensor]) -> list[SharedTensor]:
    return [SharedTensor(f"t{n}", (10,), gather) for n in range(12)]


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    tensors = _tensors(lambda: torch.full((10,), torch.nan))
    with pytest.raises(DataError, match=r"x-00001-of-00001\.safetensors: tensor 't0'"):
        write_shares(tmp_path, "x", tensors, "fp32", ALONE)


def test_a_file_is_named_with_its_hash(tmp_path: Path) -> None:
    written = write_shares(tmp_path, "x", _tensors(lambda: torch.ones(10)), "bf16", ALONE)
    ((file, (sha256, names)),) = written.items()
    assert sha256 == hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
    assert names == [f"t{n}" for n in range(12)]
    assert all(t.dtype == torch.bfloat16 for t in load_file(tmp_path / file).values())


@pytest.fixture(scope="module")
def aligned(make_tiny_run: Callable[..., Path]) -> Path:
    """Return a run that is about to tune its backbone as a whole."""
    run = make_tiny_run(
        "tuning=full",
        "order=[image]",
        *("align.max_steps=1", "tune.max_steps=6", "tune.batch_size=4"),
        *("execution.save_every=2", "execution.keep_checkpoints=1"),
    )
    (ended,) = train_command(run, "image").wait()
    assert ended.exit_code == 0, ended.log
    return run


def test_another_stage_and_number_of_ranks_continue(aligned: Path, tmp_path: Path) -> None:
    straight, changing = (
        Path(shutil.copytree(aligned, tmp_path / name)) for name in ("straight", "changing")
    )
    (ended,) = train_command(straight, "image", phases=("tune",)).wait()
    assert ended.exit_code == 0, ended.log
    for zero, ranks, failpoint in ((3, 2, "train.step:3"), (1, 2, "train.step:3"), (2, 1, "")):
        ended = train_command(
            *(changing, "image", f"execution.zero={zero}"),
            ranks=ranks,
            environment={FAILPOINT_VARIABLE: failpoint},
            phases=("tune",),
        ).wait()[0]
        assert (ended.exit_code == 0) == (not failpoint), ended.log
    assert "continuing from" in ended.log
    assert losses(changing, "01-image/tune") == pytest.approx(
        losses(straight, "01-image/tune"), rel=1e-6
    )
    found, expected = (dict(_weights(run)) for run in (changing, straight))
    before = load_file(aligned / "backbone/model.safetensors")
    assert found.keys() == expected.keys()
    error, moved = (
        sum(float((tensors[name] - expected[name]).square().sum()) for name in expected)
        for tensors in (found, before)
    )
    assert error < 1e-8 * moved
    assert not list(changing.rglob("step-*")), "a finished phase keeps no checkpoint"
    assert not list(changing.rglob("tune/backbone"))


def _weights(run: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in (run / "stages/01-image/model/backbone").glob("*.safetensors"):
        yield from load_file(path).items()


@pytest.mark.parametrize("damage", ["missing", "was changed or damaged"])
def test_a_damaged_share_is_refused(damage: str, tmp_path: Path) -> None:
    written = write_shares(tmp_path, "x", _tensors(lambda: torch.ones(10)), "fp32", ALONE)
    hashes = {file: sha256 for file, (sha256, _) in written.items()}
    assert torch.equal(SharedFiles(tmp_path, hashes, ALONE)["t3"], torch.ones(10))
    path = tmp_path / "x-00001-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path.name} .*{damage}"):
        SharedFiles(tmp_path, hashes, ALONE)
