"""Rows 7 to 10 of docs/faults.md: damaged tars, features, models and media in a training."""

import dataclasses
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train.problem import losses
from train.processes import Ended, train_command

from mera_ds.checkpoint import NewDelta, load_connector, load_delta, read_manifest, write_product
from mera_ds.cli import main
from mera_ds.errors import DataError
from mera_ds.shards.reader import ShardReader
from mera_ds.train.engine import EngineState
from mera_ds.train.state import Progress, load_checkpoint, save_checkpoint

MUTATIONS = 1000


def end(run: Path, *words: str) -> Ended:
    return train_command(run, "image", *words).wait()[0]


def overwrite(path: Path, position: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


@pytest.mark.parametrize(
    ("damage", "settings"),
    [
        (bytes(1024), ("execution.verify_shards=false", "execution.features=online")),
        (b"\xff" * 512, ("execution.verify_shards=false", "execution.features=online")),
        (b"\xff" * 512, ()),
    ],
)
def test_a_damaged_header_in_the_middle_of_a_tar(
    damage: bytes, settings: tuple[str, ...], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where tar and webdataset would give a shorter epoch; with and without the tar's hash."""
    folder = run / "data/image/train"
    tar = folder / "00000.tar"
    monkeypatch.setenv("MERA_CACHE", str(run / "cache"))
    with ShardReader(folder) as reader:
        sample = reader.samples[20]
    overwrite(tar, sample.media_offset - 512, damage)
    ended = end(run, *settings)
    assert ended.exit_code == 3, ended.log
    assert f"error: {tar}: " in ended.log
    assert sample.key in ended.log
    assert "mera-ds shards build" in ended.log
    assert not list(run.glob("stages/*/*/manifest.json"))


def test_what_is_left_of_a_cut_tar_is_trained_on_and_the_rest_counted(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MERA_CACHE", str(run / "cache"))
    folder = run / "data/image/train"
    tar = folder / "00000.tar"
    with ShardReader(folder) as reader:
        total, sample = len(reader), reader.samples[40]
    with tar.open("r+b") as file:
        file.truncate(sample.media_offset)
    ended = end(run)
    assert ended.exit_code == 3
    assert f"{tar} has {sample.media_offset} bytes, its index says " in ended.log
    assert main(["shards", "lint", str(folder), "--quarantine"]) == 0
    assert f"{total - 40} of {total} samples in quarantine" in capsys.readouterr().out
    ended = end(run)
    assert ended.exit_code == 0, ended.log
    assert "image: encoding 40 media once" in ended.log
    assert len(losses(run)) == 6


def test_a_flipped_bit_in_cached_features(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERA_CACHE", str(run / "cache"))
    assert end(run).exit_code == 0
    (features,) = (run / "cache/features").rglob("*.safetensors")
    overwrite(features, features.stat().st_size // 2, b"\x7f")
    shutil.rmtree(run / "stages")
    ended = end(run)
    assert ended.exit_code == 3, ended.log
    assert f"the features {features} can't be read (it was changed or damaged" in ended.log
    shutil.rmtree(features.parent)
    assert end(run).exit_code == 0


def tensors(seed: int, *names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, 8, generator=generator) for name in names}


def model(folder: Path) -> Callable[[], Any]:
    """Write a product with a connector and a delta; return what reads it."""
    delta = NewDelta(
        stage=1,
        modality="image",
        scale=1.0,
        rank=4,
        tensors={"l.lora_A": torch.ones(4, 8), "l.lora_B": torch.ones(8, 4)},
    )
    write_product(
        folder,
        key="key",
        step="step",
        base_sha256="base",
        previous=None,
        connectors={"image": tensors(1, "a", "b")},
        delta=delta,
    )

    def read() -> Any:
        manifest = read_manifest(folder)
        return load_connector(folder, manifest, "image"), load_delta(folder, manifest.lineage[0])

    return read


def checkpoint(folder: Path) -> Callable[[], Any]:
    """Write a checkpoint; return what reads it."""
    state = EngineState(tensors(2, "a"), tensors(3, "a.exp_avg", "a.exp_avg_sq"), {"adam_step": 2})
    save_checkpoint(folder, "key", Progress(2, 0), state, keep=2)

    def read() -> Any:
        found = load_checkpoint(folder, "key")
        assert found is not None
        return dataclasses.asdict(found[1])

    return read


def equal(found: Any, expected: Any) -> bool:
    if isinstance(found, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(found, dict):
        return found.keys() == expected.keys() and all(equal(found[k], expected[k]) for k in found)
    if isinstance(found, tuple):
        return len(found) == len(expected) and all(map(equal, found, expected))
    return bool(found == expected)


@pytest.mark.parametrize("write", [model, checkpoint])
def test_a_thousand_mutations_of_tensors(
    write: Callable[[Path], Callable[[], Any]], tmp_path: Path
) -> None:
    """Flipped and cut, each is named; those of shards: tests/shards/test_corruption.py."""
    read = write(tmp_path)
    sound = read()
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2
    draw = random.Random(0)
    for number in range(MUTATIONS // 2):
        path = files[number % 2]
        before = path.read_bytes()
        place = draw.randrange(len(before))
        flipped = bytes([before[place] ^ draw.randrange(1, 256)]) + before[place + 1 :]
        path.write_bytes(before[:place] + (flipped if draw.random() < 0.7 else b""))
        with pytest.raises(DataError, match=re.escape(str(path))):
            read()
        path.write_bytes(before)
    assert equal(read(), sound)
