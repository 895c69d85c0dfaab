"""Row 24 of docs/faults.md: code in data, weights and configurations never runs.

More: tests/test_layers.py (no call that could), tests/model/test_official.py (torch's files),
tests/test_settings.py (YAML tags), tests/merge/test_safetensors_io.py.
"""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from train.processes import train_command

from mera_ds.cli import main
from mera_ds.shards.format import Text
from mera_ds.shards.writer import RawSample, write_shards


class Harmful:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.canary,)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """Return a path at which nothing may be at the end."""
    return tmp_path / "executed"


@pytest.mark.parametrize("extension", ["pkl", "npy", "pt"])
def test_media(
    extension: str, canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = pickle.dumps(Harmful(canary))
    text = Text("c0", "caption", "", ("a shape",))
    sample = RawSample("bad", extension, content, "bad", "nowhere", (text,))
    folder = tmp_path / "shapes/train"
    write_shards(folder, "shapes", "train", "pointcloud", [sample], "CC0-1.0", {"name": "test"})
    assert main(["shards", "lint", str(folder)]) == 3
    assert f"bad.{extension}: this pointcloud can't be used" in capsys.readouterr().out
    assert not canary.exists()


def test_a_command_for_a_url(canary: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    config["modalities"]["image"]["data"] = [f"pipe:touch {canary}"]
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["run", str(run)]) == 2
    assert "commands (pipe:) and chains (::) are never run" in capsys.readouterr().err
    assert not canary.exists()


def remote_model(backbone: Path, code: str) -> None:
    """Let the backbone's configuration name a class in a file beside it."""
    path = backbone / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"model_type": "unheard-of"}
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    path.write_text(json.dumps(config), encoding="utf-8")
    (backbone / "own.py").write_text(code, encoding="utf-8")


def remote_tokenizer(backbone: Path, code: str) -> None:
    path = backbone / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "Own"}
    config["auto_map"] = {"AutoTokenizer": ["own.Own", None]}
    path.write_text(json.dumps(config), encoding="utf-8")
    (backbone / "own.py").write_text(code, encoding="utf-8")


def pickled_weights(backbone: Path, code: str) -> None:
    canary = Path(code.split("'")[1])
    (backbone / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful(canary)))
    (backbone / "model.safetensors").unlink()


def pickled_safetensors(backbone: Path, code: str) -> None:
    canary = Path(code.split("'")[1])
    (backbone / "model.safetensors").write_bytes(pickle.dumps(Harmful(canary)))


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        (remote_model, 2, "no model can be loaded from"),
        (remote_tokenizer, 2, "no tokenizer can be loaded from"),
        (pickled_weights, 2, "holds no HF checkpoint"),
        (pickled_safetensors, 3, "are damaged"),
    ],
)
def test_backbones(
    change: Callable[[Path, str], None], status: int, message: str, canary: Path, run: Path
) -> None:
    change(run / "backbone", f"from pathlib import Path\nPath('{canary}').touch()\n")
    (ended,) = train_command(run, "image").wait()
    assert not canary.exists(), ended.log
    assert ended.exit_code == status, ended.log
    assert "error: backbone.path: " in ended.log
    assert message in ended.log
