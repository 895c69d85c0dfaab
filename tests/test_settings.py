"""Strict settings: every kind of value, YAML, and overrides."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from mera_ds.errors import InputError
from mera_ds.settings import apply_overrides, dump, parse, read_yaml


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
