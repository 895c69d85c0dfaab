"""Plugins: what they register, and one clear error with file and line if they can't be used."""

import re
from pathlib import Path

import pytest

from mera_ds.config import REPOSITORY
from mera_ds.errors import DataError, InputError
from mera_ds.media import DECODERS, decode, register_decoder
from mera_ds.model.connectors import CONNECTORS, build_connector
from mera_ds.model.encoders import ENCODERS, build_encoder
from mera_ds.registry import (
    CONNECTOR,
    DECODER,
    ENCODER,
    defining_plugins,
    keep_plugins,
    load_plugin,
)

IMU = REPOSITORY / "examples/imu/imu.py"


def write(folder: Path, content: str, name: str = "own.py") -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def decoder(kind: str, body: str = "return content") -> str:
    """Return a plugin that registers a decoder."""
    return (
        "from mera_ds.plugin import register_decoder\n"
        f"def read(content, extension):\n    {body}\n"
        f"register_decoder({kind!r}, {{'bin'}}, read)\n"
    )


class TestLoading:
    def test_kinds_are_there_and_known_by_their_file(self) -> None:
        plugin = load_plugin(IMU)
        assert {"imu"} <= ENCODERS.keys() & DECODERS.keys()
        assert defining_plugins([(ENCODER, "imu")]) == {"imu.py": plugin.sha256}
        assert defining_plugins([(ENCODER, "tiny-image"), (CONNECTOR, "mlp")]) == {}

    def test_the_same_content_is_executed_once(self, tmp_path: Path) -> None:
        text = decoder("once") + "import builtins\nbuiltins.mera_test_runs += 1\n"
        import builtins

        builtins.mera_test_runs = 0  # type: ignore[attr-defined]
        for name in ("a.py", "b.py"):
            assert load_plugin(write(tmp_path, text, name)).path == tmp_path / name
        assert builtins.mera_test_runs == 1  # type: ignore[attr-defined]

    def test_nothing_is_written_beside_it(self, tmp_path: Path) -> None:
        load_plugin(write(tmp_path, decoder("clean")))
        assert [path.name for path in tmp_path.iterdir()] == ["own.py"]

    def test_an_encoder_depends_on_the_decoder_in_another_file(self, tmp_path: Path) -> None:
        first = load_plugin(write(tmp_path, decoder("split"), "media.py"))
        text = IMU.read_text(encoding="utf-8").partition("register_decoder(")[0]
        text = text.replace('media = "imu"', 'media = "split"')
        text += 'register_encoder("split", ImuEncoder)\n'
        second = load_plugin(write(tmp_path, text, "encoder.py"))
        found = defining_plugins([(ENCODER, "split")])
        assert found == {"encoder.py": second.sha256, "media.py": first.sha256}

    def test_features_depend_on_the_file(self, tmp_path: Path) -> None:
        load_plugin(IMU)
        text = IMU.read_text(encoding="utf-8").replace('"imu"', '"imu-later"')
        load_plugin(write(tmp_path, text))
        one, other = (build_encoder(kind, {}, None) for kind in ("imu", "imu-later"))
        assert one.fingerprint != other.fingerprint

    def test_connectors(self, tmp_path: Path) -> None:
        text = (
            "from mera_ds.plugin import register_connector\n"
            "from mera_ds.model.connectors import MlpConnector\n"
            "register_connector('mine', type('Mine', (MlpConnector,), {}))\n"
        )
        load_plugin(write(tmp_path, text))
        assert isinstance(build_connector("mine", {}, 8, 16), CONNECTORS["mine"])


class TestErrors:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("x = 1\nif x\n", r"own.py, line 2\): SyntaxError: expected ':'"),
            ("x = 1\n\nnowhere()\n", r"own.py, line 3\): NameError: name 'nowhere'"),
            ("import no_such_module\n", r"own.py, line 1\): ModuleNotFoundError: No module"),
            ("import sys\nsys.exit(3)\n", r"own.py, line 2\): SystemExit: 3"),
            ("x = 1\n", r"own.py registers nothing; call register_encoder"),
            (decoder("image"), r"line 4\): the media kind 'image' is one of mera-ds itself"),
            (
                "from mera_ds.plugin import register_encoder\nregister_encoder('e', dict)\n",
                r"line 2\): encoder kind 'e': <class 'dict'> is no subclass of Encoder",
            ),
            (
                "from mera_ds.plugin import Encoder, register_encoder\n"
                "class E(Encoder): pass\nregister_encoder('e', E)\n",
                r"line 3\): encoder kind 'e': E has no 'media'",
            ),
        ],
    )
    def test_it_names_file_and_line(self, content: str, message: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=message):
            load_plugin(write(tmp_path, content))

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no\.py can't be read: No such file"):
            load_plugin(tmp_path / "no.py")

    def test_two_plugins_with_one_kind(self, tmp_path: Path) -> None:
        first = load_plugin(write(tmp_path, decoder("twice"), "first.py"))
        message = re.escape(f"the media kind 'twice' is that of {first.path} already")
        with pytest.raises(InputError, match=message):
            load_plugin(write(tmp_path, decoder("twice") + "\n", "second.py"))

    def test_a_broken_plugin_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="line 5"):
            load_plugin(write(tmp_path, decoder("half") + "1 / 0\n"))
        assert "half" not in DECODERS
        load_plugin(write(tmp_path, decoder("half")))
        assert "half" in DECODERS

    def test_only_plugins_register(self) -> None:
        with pytest.raises(InputError, match="name the file under 'plugins'"):
            register_decoder("loose", {"bin"}, lambda content, extension: content)

    def test_two_plugins_of_one_name_in_a_run(self, tmp_path: Path) -> None:
        plugin = load_plugin(write(tmp_path, decoder("named")))
        (known,) = keep_plugins([plugin], tmp_path / "run")
        assert known == "{run}/plugins/own.py"
        with pytest.raises(InputError, match="is another plugin than"):
            keep_plugins([plugin], tmp_path / "run", [known])


class TestDecoding:
    def test_values_pass(self, tmp_path: Path) -> None:
        load_plugin(write(tmp_path, decoder("bytes")))
        assert decode("bytes", "BIN", b"abc", "set/a") == b"abc"

    def test_an_error_names_the_sample(self, tmp_path: Path) -> None:
        load_plugin(write(tmp_path, decoder("fails", "return content[99]")))
        with pytest.raises(DataError, match=r"set/a: this fails can't be used: IndexError: index"):
            decode("fails", "bin", b"abc", "set/a")

    def test_other_extensions_are_refused(self, tmp_path: Path) -> None:
        load_plugin(write(tmp_path, decoder("strict")))
        with pytest.raises(DataError, match=r"set/a: .* it ends with .wav; expected .bin"):
            decode("strict", "wav", b"abc", "set/a")
        assert defining_plugins([(DECODER, "strict")])
