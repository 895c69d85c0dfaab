"""`mera-ds add` on a run: what it writes, and that it writes nothing if anything is wrong."""

import dataclasses
import multiprocessing
import runpy
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli.commands import listing
from http_server import serving

from mera_ds.cli import main
from mera_ds.config import REPOSITORY, load_config
from mera_ds.errors import InputError, LockedError, MeraError
from mera_ds.files import folder_lock
from mera_ds.identity import product_key
from mera_ds.modality import add_modality
from mera_ds.plan import TrainStep, load_plan
from mera_ds.registry import load_plugin
from mera_ds.sequence import open_run
from mera_ds.settings import read_yaml

EXAMPLE = REPOSITORY / "examples/imu"

Changed = Callable[..., Path]


@pytest.fixture(scope="module")
def own_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the example with its shards."""
    folder = tmp_path_factory.mktemp("own") / "imu"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("shards", "__pycache__"))
    runpy.run_path(str(folder / "make_shards.py"))["main"](folder / "shards")
    return folder


@pytest.fixture
def own(own_template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(own_template, tmp_path / "imu"))


@pytest.fixture
def changed(own: Path) -> Changed:
    """Return a function that changes settings of the modality's file, or texts in its plugin.

    A changed plugin's kinds get another name: this process knows those of the example already.
    """

    def change(code: tuple[str, str] | None = None, **settings: Any) -> Path:
        values = read_yaml(own / "imu.yaml")
        if code is not None:
            kind = f"imu-{abs(hash(code))}"
            text = (own / "imu.py").read_text(encoding="utf-8")
            assert code[0] in text
            text = text.replace(*code).replace('"imu"', f'"{kind}"')
            (own / "imu.py").write_text(text, encoding="utf-8")
            values["encoder"] = {"kind": kind}
        (own / "imu.yaml").write_text(yaml.safe_dump({**values, **settings}), encoding="utf-8")
        return own / "imu.yaml"

    return change


@pytest.fixture
def short(make_tiny_run: Callable[..., Path]) -> Path:
    """Return a run that learns one modality."""
    return make_tiny_run("order=[image]")


def keys(folder: Path) -> dict[str, str]:
    """Return the key of every step of a run that depends on no product."""
    config, plan = load_config(folder), load_plan(folder / "plan.json")
    steps = [step for step in plan.steps if isinstance(step, TrainStep) and step.start is None]
    return {step.name: product_key(config, folder, plan, step) for step in steps}


class TestAdding:
    def test_configuration_and_plan_grow_at_the_end(self, short: Path, own: Path) -> None:
        before, old = load_config(short), load_plan(short / "plan.json").steps
        add_modality(short, own / "imu.yaml")
        after, new = load_config(short), load_plan(short / "plan.json").steps
        assert after.order == ("image", "imu")
        assert new[: len(old)] == old
        names = [step.name for step in new[len(old) :]]
        assert names == [f"02-imu/{s}" for s in ("align", "tune", "merge", "realign", "evaluate")]
        entry = after.modalities["imu"]
        assert entry.data == (f"{own}/shards",)
        assert after.plugins == ("{run}/plugins/imu.py",)
        assert (short / "plugins/imu.py").read_bytes() == (own / "imu.py").read_bytes()
        rest = {**after.modalities}
        del rest["imu"]
        undone = dataclasses.replace(after, order=("image",), modalities=rest, plugins=())
        assert undone == before

    def test_its_shards_may_be_a_url(
        self, short: Path, own: Path, changed: Changed, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MERA_CACHE", str(own / "cache"))
        with serving(own / "shards") as url:
            add_modality(short, changed(data=[url]))
        assert load_config(short).modalities["imu"].data == (url,)

    def test_keys_of_earlier_steps_stay(
        self, make_tiny_run: Callable[..., Path], own: Path
    ) -> None:
        folder = make_tiny_run("method=expert")
        before = keys(folder)
        add_modality(folder, own / "imu.yaml")
        after = keys(folder)
        assert list(before)[-1] == "04-pointcloud/align"
        assert len(before) == 4
        assert after.keys() - before.keys() == {"05-imu/align"}
        assert {name: after[name] for name in before} == before

    def test_the_key_depends_on_the_plugin(
        self, make_tiny_run: Callable[..., Path], short: Path, own: Path, changed: Changed
    ) -> None:
        """The kinds' names differ here as well; the fact itself is compared."""
        from mera_ds.identity import used_plugins

        one = add_modality(short, own / "imu.yaml")
        other = add_modality(
            make_tiny_run("order=[image]"), changed(("log1p(spectra)", "sqrt(spectra)"))
        )
        assert used_plugins(one, ["imu"]) != used_plugins(other, ["imu"])
        assert used_plugins(one, ["image"]) == {}

    def test_a_modality_of_the_package_needs_no_plugin(self, short: Path, tmp_path: Path) -> None:
        entry = {
            "modality": "audio",
            "data": ["{run}/data/audio"],
            "caption_prompt": "What sounds?",
            "encoder": {"kind": "tiny-audio"},
            "connector": {"kind": "mlp"},
        }
        file = tmp_path / "audio.yaml"
        file.write_text(yaml.safe_dump(entry), encoding="utf-8")
        config = add_modality(short, file)
        assert config.order == ("image", "audio")
        assert config.plugins == ()
        assert load_config(short).modalities["audio"].caption_prompt == "What sounds?"

    def test_stopped_in_between(
        self, short: Path, own: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MERA_FAILPOINT", "add.plan_written")
        context = multiprocessing.get_context("fork")
        process = context.Process(target=add_modality, args=(short, own / "imu.yaml"))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        monkeypatch.delenv("MERA_FAILPOINT")
        message = "'mera-ds add' was stopped while it wrote them; run it again"
        with pytest.raises(InputError, match=message):
            open_run(short)
        add_modality(short, own / "imu.yaml")
        assert open_run(short).config.order == ("image", "imu")

    def test_a_profile_may_name_plugins(
        self, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        profile = read_yaml(REPOSITORY / "mera_ds/profiles/tiny.yaml")
        modality = read_yaml(own / "imu.yaml")
        profile |= {"order": ["imu", "image"], "plugins": modality.pop("plugins")}
        del modality["modality"]
        profile["modalities"]["imu"] = {**modality, "data": [f"{own}/shards"]}
        (own / "profile.yaml").write_text(yaml.safe_dump(profile), encoding="utf-8")
        folder = tmp_path / "own"
        assert main(["init", str(folder), "--profile", str(own / "profile.yaml")]) == 0
        assert load_config(folder).plugins == ("{run}/plugins/imu.py",)
        (own / "imu.py").unlink()
        assert main(["plan", str(folder)]) == 0
        assert "01-imu/align" in capsys.readouterr().out
        assert main(["shards", "lint", str(own / "shards"), "--run", str(folder)]) == 0
        lines = capsys.readouterr().out.splitlines()
        sound = "sound and fits the run"
        assert lines == [f"{own}/shards/{split}: {sound}" for split in ("test", "train")]

    def test_lint_says_what_it_did_not_decode(
        self, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """As in a process that knows no plugin: the set is one of a kind that nobody defined."""
        source = (own / "make_shards.py").read_text(encoding="utf-8")
        text = source.replace('modality="imu"', 'modality="unheard"')
        (own / "make_shards.py").write_text(text, encoding="utf-8")
        runpy.run_path(str(own / "make_shards.py"))["main"](tmp_path / "unheard")
        assert main(["shards", "lint", str(tmp_path / "unheard")]) == 0
        lines = capsys.readouterr().out.splitlines()
        unknown = "  its media were not decoded: their kind is unknown; give --plugin or --run"
        assert lines[-3:] == [unknown, f"{tmp_path}/unheard/train: sound", unknown]


class TestRefusing:
    def refuse(self, folder: Path, file: Path, message: str) -> None:
        before = listing(folder)
        with pytest.raises(MeraError, match=message):
            add_modality(folder, file)
        assert listing(folder) == before

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"lora": {"rank": 4}}, r"imu.yaml: key 'lora' is unknown"),
            ({"caption_promt": "x"}, r"'caption_promt' is unknown; did you mean 'caption_prompt'"),
            ({"modality": "Imu 6"}, r"modality is 'Imu 6'; it must be made of"),
            ({"modality": "image"}, r"learns image already"),
            ({"modality": "motion"}, r"holds shards of modality 'imu', not 'motion'"),
            ({"data": ["nowhere"]}, r"nowhere"),
            ({"plugins": ["no.py"]}, r"the plugin .*/no.py can't be read"),
            ({"encoder": {"kind": "imv"}}, r"encoder: kind 'imv' is unknown"),
            (
                {"encoder": {"kind": "imu", "options": {"window": 2}}},
                r"encoder.options: key 'window' is unknown; did you mean 'windows'",
            ),
            (
                {"encoder": {"kind": "imu", "options": {"windows": 400}}},
                r"would be 400 \+ \d+ tokens long, .* more than prompt.max_length=256",
            ),
            ({"connector": {"kind": "mlp", "options": {"dept": 1}}}, r"did you mean 'depth'"),
        ],
    )
    def test_settings(
        self, settings: dict[str, Any], message: str, short: Path, changed: Changed
    ) -> None:
        load_plugin(EXAMPLE / "imu.py")
        self.refuse(short, changed(**settings), message)

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            (("        self.freeze()\n", ""), r"its __init__ must end with self.freeze\(\)"),
            (("[: self.max_tokens * WINDOW]", ".repeat(2, 1)"), r"gave 8 tokens, more than its"),
            (
                ("self.feature_dim = options.feature_dim", "self.feature_dim = 9"),
                r"values of shape",
            ),
            (("torch.tanh(", "torch.log("), r"not finite, or not the same twice"),
            (("rows).to(", "rows[:1]).to("), r"shape \(1, 4, 64\) for 2 media; expected \(2, 4"),
            (
                ("means = windows.mean(dim=1)", "means = windows[99]"),
                r"imu/imu-.*can't be encoded \(.*imu.py, line \d+\): IndexError",
            ),
            (("WINDOW = 32", "WINDOW = = 32"), r"imu.py, line 27\): SyntaxError: invalid syntax"),
            (("CHANNELS = 6", "CHANNELS = 5"), r"imu/.*npy: this .* ValueError: its shape is"),
        ],
    )
    def test_code(self, code: tuple[str, str], message: str, short: Path, changed: Changed) -> None:
        self.refuse(short, changed(code), message)

    def test_a_kind_that_is_taken(self, short: Path, changed: Changed) -> None:
        code = ('register_encoder("imu", ', 'register_encoder("tiny-image", ')
        self.refuse(short, changed(code), "the encoder kind 'tiny-image' is one of mera-ds itself")

    def test_a_plan_of_another_method(self, short: Path, own: Path) -> None:
        text = (short / "config.yaml").read_text(encoding="utf-8")
        (short / "config.yaml").write_text(text.replace("order:\n- image", "order:\n- audio"))
        self.refuse(short, own / "imu.yaml", "is not the plan of the method 'mera' for this order")

    def test_no_run(self, own: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="there is no run at"):
            add_modality(tmp_path / "nowhere", own / "imu.yaml")

    def test_a_run_in_use(self, short: Path, own: Path) -> None:
        with folder_lock(short), pytest.raises(LockedError):
            add_modality(short, own / "imu.yaml")
