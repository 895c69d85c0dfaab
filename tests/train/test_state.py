"""Checkpoints on disk: whole or absent, checked when read, and few."""

from pathlib import Path

import pytest
import torch

from mera_ds.errors import DataError, InputError, ResourceError
from mera_ds.files import read_json, write_json
from mera_ds.train.engine import EngineState
from mera_ds.train.state import Progress, load_checkpoint, remove_checkpoints, save_checkpoint

NAME = "connector:image/layers.0.weight"


def _state(value: float) -> EngineState:
    tensor = torch.full((3, 2), value)
    moments = {f"{NAME}.exp_avg": tensor / 2, f"{NAME}.exp_avg_sq": tensor**2}
    return EngineState({NAME: tensor}, moments, {"adam_step": 4.0, "scaler_cur_iter": 7})


def _save(folder: Path, step: int, keep: int = 2, keep_every: int = 0) -> int:
    progress = Progress(step, nonfinite_steps=1)
    return save_checkpoint(
        folder, "key", progress, _state(float(step)), keep=keep, keep_every=keep_every
    )


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    found = load_checkpoint(tmp_path, "key")
    assert found is not None
    progress, state = found
    assert progress == Progress(5, 1)
    assert state.scalars == {"adam_step": 4.0, "scaler_cur_iter": 7}
    assert isinstance(state.scalars["scaler_cur_iter"], int)
    expected = _state(5)
    assert state.parameters.keys() == expected.parameters.keys()
    assert state.moments.keys() == expected.moments.keys()
    assert torch.equal(state.parameters[NAME], expected.parameters[NAME])
    assert all(torch.equal(state.moments[key], expected.moments[key]) for key in state.moments)


def test_nothing_saved_is_a_fresh_start(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "absent", "key") is None


def test_the_newest_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    for step in (98, 99, 100, 101):
        _save(tmp_path, step, keep=3)
    assert _names(tmp_path) == ["step-000099", "step-000100", "step-000101"]
    found = load_checkpoint(tmp_path, "key")
    assert found is not None
    assert found[0].step == 101


def test_every_nth_is_kept_too(tmp_path: Path) -> None:
    for step in range(2, 21, 2):
        _save(tmp_path, step, keep=2, keep_every=6)
    assert _names(tmp_path) == [f"step-0000{step:02d}" for step in (6, 12, 18, 20)]


def test_its_size_is_told(tmp_path: Path) -> None:
    size = _save(tmp_path, 5)
    assert size == 3 * 3 * 2 * 4, "a parameter and two moments, fp32"
    files = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert size < files < size + 1000


def test_an_unfinished_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    _save(tmp_path, 2)
    (tmp_path / "step-000002").rename(tmp_path / "step-000002.partial-123")
    found = load_checkpoint(tmp_path, "key")
    assert found is not None
    assert found[0].step == 1


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    with pytest.raises(
        InputError, match=r"step-000005 was made with other data, settings"
    ) as error:
        load_checkpoint(tmp_path, "another key")
    assert f"delete {tmp_path} to start this phase anew" in str(error.value)
    assert _names(tmp_path) == ["step-000005"], "a refusal deletes nothing"


@pytest.mark.parametrize("name", ["trainables", "moments"])
@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_damaged_file_is_refused(name: str, place: int, tmp_path: Path) -> None:
    _save(tmp_path, 5)
    path = tmp_path / "step-000005" / f"{name}.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}\.safetensors was changed or damaged"):
        load_checkpoint(tmp_path, "key")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    (tmp_path / "step-000005" / "moments.safetensors").unlink()
    with pytest.raises(DataError, match=r"moments\.safetensors is missing"):
        load_checkpoint(tmp_path, "key")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_saved(value: float, tmp_path: Path) -> None:
    _save(tmp_path, 5)
    with pytest.raises(DataError, match="not finite"):
        save_checkpoint(tmp_path, "key", Progress(6, 0), _state(value), keep=1)
    assert _names(tmp_path) == ["step-000005"]


def test_a_checkpoint_that_does_not_fit_the_disk_is_not_begun(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    huge = EngineState({NAME: torch.zeros(1).expand(10**16)}, {}, {})
    with pytest.raises(ResourceError, match="free some space"):
        save_checkpoint(tmp_path, "key", Progress(6, 0), huge, keep=1)
    assert _names(tmp_path) == ["step-000005"]


def test_a_finished_phase_leaves_no_checkpoint_but_its_other_files(tmp_path: Path) -> None:
    write_json(tmp_path / "replay.json", {"ids": []})
    _save(tmp_path, 4)
    _save(tmp_path, 5)
    (tmp_path / "step-000004" / "state.json").unlink()  # killed while it was removed
    remove_checkpoints(tmp_path)
    assert _names(tmp_path) == ["replay.json"]
    assert read_json(tmp_path / "replay.json") == {"ids": []}
