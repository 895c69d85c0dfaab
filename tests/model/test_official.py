"""Reading official files: what they may hold, and what is refused."""

import argparse
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mera_ds.errors import DataError, InputError
from mera_ds.model.official import load_exactly, read_official

STATE = {"a.weight": torch.arange(4.0), "b": torch.ones(2, dtype=torch.float16)}


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.bin", "x.ckpt"])
@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
def test_torch_files_give_their_tensors_and_the_rest(
    tmp_path: Path, name: str, nested: str | None
) -> None:
    content = {nested: OrderedDict(STATE), "cfg": {"layers": 2}} if nested else STATE
    torch.save(content, tmp_path / name)
    file = read_official(tmp_path / name, "it")
    assert file.tensors.keys() == STATE.keys()
    assert all(torch.equal(file.tensors[key], STATE[key]) for key in STATE)
    assert dict(file.rest) == ({"cfg": {"layers": 2}} if nested else {})


def test_safetensors_give_their_metadata(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "x.safetensors", {"cfg": "{}"})
    file = read_official(tmp_path / "x.safetensors", "it")
    assert file.tensors.keys() == STATE.keys()
    assert file.rest == {"cfg": "{}"}


def test_a_training_scripts_leftovers_are_dropped(tmp_path: Path) -> None:
    leftovers = {"args": argparse.Namespace(lr=1.0), "best": np.float32(0.5)}
    torch.save({"state_dict": STATE, **leftovers}, tmp_path / "x.pt")
    file = read_official(tmp_path / "x.pt", "it")
    assert file.tensors.keys() == STATE.keys()
    assert not isinstance(file.rest["args"], argparse.Namespace)


class Harmful:
    """Writes a file when it is unpickled by a reader that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "x": Harmful(tmp_path / "ran")}, tmp_path / "x.pt")
    with pytest.raises(DataError, match=r"x\.pt is no file of torch\.save with tensors"):
        read_official(tmp_path / "x.pt", "it")
    assert not (tmp_path / "ran").exists()


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with pytest.raises(InputError, match=r"it: weights .*x\.pt do not exist"):
        read_official(path, "it")
    path.write_bytes(b"")
    with pytest.raises(DataError, match="no file of torch"):
        read_official(path, "it")
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match="no file of torch"):
        read_official(path, "it")
    torch.save([1, 2], path)
    with pytest.raises(DataError, match="holds a list"):
        read_official(path, "it")
    torch.save({"epoch": 3}, path)
    with pytest.raises(DataError, match="holds no tensors"):
        read_official(path, "it")
    save_file(STATE, tmp_path / "x.safetensors")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.safetensors").read_bytes())
    with pytest.raises(DataError, match="no file of torch"):
        read_official(path, "it")


def test_a_network_without_memory_gets_it_from_the_file() -> None:
    with torch.device("meta"):
        network = torch.nn.Linear(3, 2)
    state = {"weight": torch.randn(2, 3).half(), "bias": torch.ones(2)}
    load_exactly(network, state, Path("x.pt"), "it")
    assert network.weight.dtype == torch.float32
    assert torch.equal(network.weight, state["weight"].float())
