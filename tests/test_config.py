"""Configuration: strict loading, overrides, YAML, paths, and what a run lets change."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from mera_ds.config import (
    REPOSITORY,
    RunConfig,
    apply_overrides,
    cache_folder,
    dump,
    load_config,
    load_profile,
    parse,
    profile_names,
    read_yaml,
    resolve_path,
    save_config,
)
from mera_ds.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Part:
    """A section of a section."""

    size: int
    rate: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every kind of value that a configuration can have."""

    name: str
    parts: Mapping[str, Part] = field(default_factory=dict)
    kind: Literal["small", "large"] = "small"
    level: Literal[0, 1, 2] = 1
    flag: bool = False
    limit: int | None = None
    words: tuple[str, ...] = ()
    free: Mapping[str, Any] = field(default_factory=dict)


WHOLE: dict[str, Any] = {
    "name": "x",
    "parts": {"a": {"size": 1, "rate": 0.5}, "b": {"size": 2, "rate": 3.0}},
    "kind": "large",
    "level": 0,
    "flag": True,
    "limit": 7,
    "words": ["one", "two"],
    "free": {"list": [1, {"deep": None}], "text": "y"},
}


class TestParse:
    def test_every_kind_of_value_comes_back(self) -> None:
        settings = parse(Settings, WHOLE, "file")
        assert settings.parts["b"] == Part(size=2, rate=3.0)
        assert settings.words == ("one", "two")
        assert dump(settings) == WHOLE
        assert parse(Settings, dump(settings), "file") == settings

    def test_defaults_fill_what_is_left_out(self) -> None:
        assert parse(Settings, {"name": "x"}, "file") == Settings(name="x")

    def test_a_whole_number_is_a_valid_float(self) -> None:
        rate = parse(Part, {"size": 1, "rate": 2}, "file").rate
        assert (rate, type(rate)) == (2.0, float)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"nmae": "x"}, r"^file: key 'nmae' is unknown; did you mean 'name'\?$"),
            ({"qqqq": 1}, r"^file: key 'qqqq' is unknown; valid: flag, free, kind, "),
            ({1: 1}, r"^file: key '1' is unknown"),
            ({True: 1}, r"^file: key 'True' is unknown"),
            ({"parts": {"a": {"seize": 1}}}, r"^file\.parts\.a: key 'seize'.*mean 'size'"),
            ({"parts": {"a": {}}}, r"^file\.parts\.a: missing key 'size'"),
            ({"parts": {"a": {"size": 1.0}}}, r"^file\.parts\.a\.size is 1\.0; expected int"),
            ({"parts": {"a": {"size": True}}}, r"^file\.parts\.a\.size is True; expected int"),
            ({"parts": {"a": {"size": 1, "rate": True}}}, r"rate is True; expected float"),
            ({"parts": {"a": {"size": 1, "rate": "2e-5"}}}, r"rate is '2e-5'; expected float"),
            ({"parts": {"a": 5}}, r"^file\.parts\.a: expected a mapping, got 5"),
            ({"parts": ["a"]}, r"^file\.parts is \['a'\]; expected a mapping"),
            ({"name": 5}, r"^file\.name is 5; expected str"),
            ({"name": None}, r"^file\.name is None; expected str"),
            ({"kind": "medium"}, r"^file\.kind is 'medium'; valid: small, large"),
            ({"kind": ["small"]}, r"^file\.kind is \['small'\]; valid"),
            ({"level": 3}, r"^file\.level is 3; valid: 0, 1, 2"),
            ({"level": True}, r"^file\.level is True; valid: 0, 1, 2"),
            ({"level": 1.0}, r"^file\.level is 1\.0; valid: 0, 1, 2"),
            ({"flag": 1}, r"^file\.flag is 1; expected bool"),
            ({"limit": "7"}, r"^file\.limit is '7'; expected int"),
            ({"words": "one"}, r"^file\.words is 'one'; expected a list"),
            ({"words": ["one", 2]}, r"^file\.words\[1\] is 2; expected str"),
            ({"free": 1}, r"^file\.free is 1; expected a mapping"),
        ],
    )
    def test_what_is_wrong_is_named(self, change: dict[Any, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            parse(Settings, {**WHOLE, **change}, "file")

    def test_a_missing_key_is_named(self) -> None:
        with pytest.raises(InputError, match=r"^file: missing key 'name'; add it$"):
            parse(Settings, {}, "file")

    def test_only_a_mapping_is_parsed(self) -> None:
        with pytest.raises(InputError, match=r"^file: expected a mapping, got \[1\]$"):
            parse(Settings, [1], "file")


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("2e-5", 2e-5),
            ("-2e5", -2e5),
            ("+.5E3", 500.0),
            ("1.5e-3", 1.5e-3),
            ("3.", 3.0),
            ("12", 12),
            ("'2e-5'", "2e-5"),
            ("2e", "2e"),
            ("e5", "e5"),
        ],
    )
    def test_numbers(self, tmp_path: Path, text: str, value: object) -> None:
        (tmp_path / "x.yaml").write_text(f"a: {text}\n")
        found = read_yaml(tmp_path / "x.yaml")["a"]
        assert found == value
        assert type(found) is type(value)

    @pytest.mark.parametrize("content", ["a: [1", "a: \t1", "\0", "a: *nothing"])
    def test_a_broken_file_is_named(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "x.yaml").write_text(content)
        with pytest.raises(InputError, match=r"x\.yaml is not valid YAML"):
            read_yaml(tmp_path / "x.yaml")

    @pytest.mark.parametrize("content", ["", "- 1", "text"])
    def test_a_file_without_settings_is_named(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "x.yaml").write_text(content)
        with pytest.raises(InputError, match=r"x\.yaml must hold a mapping"):
            read_yaml(tmp_path / "x.yaml")

    def test_a_tag_never_runs_anything(self, tmp_path: Path) -> None:
        canary = tmp_path / "canary"
        tag = f"a: !!python/object/apply:pathlib.Path.touch [!!python/name:x '{canary}']"
        (tmp_path / "x.yaml").write_text(tag)
        with pytest.raises(InputError, match="not valid YAML"):
            read_yaml(tmp_path / "x.yaml")
        assert not canary.exists()


class TestOverrides:
    def test_they_reach_any_depth_and_leave_the_original(self) -> None:
        values = {"a": {"b": 1, "c": 2}, "d": 3}
        changed = apply_overrides(
            values, ["a.b=2e-5", "d=[x, 1]", "e.f.g=true", "d2=a=b", "h=", "p={run}/a"]
        )
        assert changed == {
            "a": {"b": 2e-5, "c": 2},
            "d": ["x", 1],
            "e": {"f": {"g": True}},
            "d2": "a=b",
            "h": None,
            "p": "{run}/a",
        }
        assert values == {"a": {"b": 1, "c": 2}, "d": 3}

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("seed", r"'seed' must look like section\.key=value"),
            ("build.x=1", r"'build\.x=1': build is not a section"),
            ("seed=[1", r"seed is '\[1'; expected int"),
            ("sede=1", r"key 'sede' is unknown; did you mean 'seed'"),
            ("tune.batchsize=1", r"tune: key 'batchsize'.*did you mean 'batch_size'"),
            ("modalities.image.encoder.kinds=x", r"image\.encoder: key 'kinds'.*'kind'"),
            ("tune.batch_size=many", r"tune\.batch_size is 'many'; expected int"),
            ("tune.batch_size=0", r"tune\.batch_size is 0; it must be at least 1"),
            ("align.max_steps=0", r"align\.max_steps is 0; it must be at least 1"),
            ("execution.micro_batch_size=0", r"execution\.micro_batch_size is 0; .* at least 1"),
            ("execution.save_every=-1", r"execution\.save_every is -1; it must be at least 1"),
            ("execution.workers=-1", r"execution\.workers is -1; it must be at least 0"),
            ("execution.zero=4", r"execution\.zero is 4; valid: 0, 1, 2, 3"),
            ("evaluate.limit=0", r"evaluate\.limit is 0; it must be at least 1"),
            ("evaluate.batch_size=0", r"evaluate\.batch_size is 0; it must be at least 1"),
            ("lora.rank=0", r"lora\.rank is 0; it must be at least 1"),
            ("replay.percent=0", r"replay\.percent is 0\.0; it must be in \(0, 100\]"),
            ("replay.percent=101", r"replay\.percent is 101\.0; it must be in \(0, 100\]"),
            ("tune.lr_backbone=null", r"tune\.lr_backbone is missing"),
            ("order=[image, image]", r"order names a modality twice: image, image"),
            ("order=[imgae]", r"order: modality 'imgae' is unknown; did you mean 'image'"),
        ],
    )
    def test_a_wrong_one_is_named(self, override: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            load_profile("tiny", [override])

    def test_zero_is_allowed_where_it_means_something(self) -> None:
        overrides = ("workers=0", "zero=0", "max_nonfinite_steps=0")
        config = load_profile("tiny", [f"execution.{text}" for text in overrides])
        assert config.execution.zero == 0


class TestProfiles:
    def test_an_unknown_name_gets_the_nearest(self) -> None:
        with pytest.raises(InputError, match=r"profile 'tine' is unknown; did you mean 'tiny'"):
            load_profile("tine")

    def test_a_file_can_be_a_profile(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        values = dump(load_profile("tiny"))
        del values["profile"]
        path.write_text(yaml.safe_dump(values))
        assert load_profile(str(path)) == dataclasses.replace(load_profile("tiny"), profile="mine")

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"gone\.yaml does not exist"):
            load_profile(str(tmp_path / "gone.yaml"))


class TestRunFolder:
    @pytest.mark.parametrize("name", profile_names())
    def test_what_is_saved_is_what_is_loaded(self, tmp_path: Path, name: str) -> None:
        config = load_profile(name, ["tune.lr_backbone=2e-5", "align.max_grad_norm=1e-9"])
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path) == config
        assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == dump(config)

    def test_execution_may_change(self, tmp_path: Path) -> None:
        save_config(load_profile("tiny"), tmp_path / "config.yaml")
        config = load_config(tmp_path, ["execution.workers=3", "execution.zero=2"])
        assert (config.execution.workers, config.execution.zero) == (3, 2)
        assert load_config(tmp_path).execution.workers == 0

    @pytest.mark.parametrize(
        "text", ["seed=1", "tune.batch_size=8", "execution=1", "executions.x=1"]
    )
    def test_nothing_else_may(self, tmp_path: Path, text: str) -> None:
        save_config(load_profile("tiny"), tmp_path / "config.yaml")
        with pytest.raises(InputError, match=rf"'{text}' can't change in an existing run"):
            load_config(tmp_path, [text])

    def test_a_folder_without_a_run_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"there is no run at .*mera-ds init"):
            load_config(tmp_path / "nowhere")


class TestPaths:
    def test_places_are_filled_in(self, tmp_path: Path, cache: Path) -> None:
        assert resolve_path("{run}/a", tmp_path) == tmp_path / "a"
        assert resolve_path("{cache}/a", tmp_path) == cache / "a" == cache_folder() / "a"
        assert resolve_path("{repository}/a", tmp_path) == REPOSITORY / "a"
        assert resolve_path("~/a", tmp_path) == Path.home() / "a"
        assert resolve_path("/data/a", tmp_path) == Path("/data/a")

    def test_weights_and_shards_lie_where_variables_say(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("weights", "shards"):
            monkeypatch.delenv(f"MERA_{name.upper()}", raising=False)
            home = Path.home() / "mera" / name
            assert resolve_path(f"{{{name}}}/a", tmp_path) == home / "a"
            monkeypatch.setenv(f"MERA_{name.upper()}", str(tmp_path / name))
            assert resolve_path(f"{{{name}}}/a", tmp_path) == tmp_path / name / "a"

    @pytest.mark.parametrize("text", ["{home}/a", "{}/a", "{run/a", "{0}/a", "{run.nowhere}/a"])
    def test_an_unknown_place_is_named(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(InputError, match=r"holds an unknown place; valid: \{run\}, \{cache\}"):
            resolve_path(text, tmp_path)


def test_a_configuration_cannot_change() -> None:
    config: RunConfig = load_profile("tiny")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
