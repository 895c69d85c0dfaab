"""Configuration: profiles, paths, and what a run lets change."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from mera_ds.config import (
    REPOSITORY,
    RunConfig,
    cache_folder,
    load_config,
    load_profile,
    profile_names,
    resolve_path,
    save_config,
)
from mera_ds.errors import InputError
from mera_ds.settings import dump


class TestOverrides:
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
            ("seed=-1", r"seed is -1; it must be at least 0"),
            ("tune.warmup_ratio=2", r"tune\.warmup_ratio is 2\.0; it must be in \[0, 1\]"),
            ("align.lr_connector=-1", r"align\.lr_connector is -1\.0; it must be at least 0"),
            ("realign.weight_decay=.nan", r"realign\.weight_decay is nan; it must be at least 0"),
            ("lora.dropout=1.5", r"lora\.dropout is 1\.5; it must be in \[0, 1\]"),
            ("evaluate.judge_prices=[1]", r"judge_prices must be \[input, output\]"),
            ("replay.percent=0", r"replay\.percent is 0\.0; it must be in \(0, 100\]"),
            (
                "replay.realign_percent=0",
                r"replay\.realign_percent is 0\.0; it must be in \(0, 100\]",
            ),
            ("replay.percent=101", r"replay\.percent is 101\.0; it must be in \(0, 100\]"),
            ("tune.lr_backbone=null", r"tune\.lr_backbone is missing"),
            ("order=[image, image]", r"order names a modality twice: image, image"),
            ("order=[]", r"order is empty; name some of image, "),
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


class TestBase:
    """A profile that holds only what differs from another."""

    def test_sections_are_merged_and_lists_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text("base: tiny\norder: [audio]\nlora: {rank: 4}\nexecution: {zero: 2}\n")
        mine, tiny = load_profile(str(path), ["seed=5"]), load_profile("tiny")
        assert mine == dataclasses.replace(
            tiny,
            profile="mine",
            seed=5,
            order=("audio",),
            lora=dataclasses.replace(tiny.lora, rank=4),
            execution=dataclasses.replace(tiny.execution, zero=2),
        )

    def test_a_base_can_be_a_file_beside_it_with_a_base_of_its_own(self, tmp_path: Path) -> None:
        (tmp_path / "middle.yaml").write_text("base: tiny\nseed: 3\nlora: {rank: 4}\n")
        (tmp_path / "top.yaml").write_text("base: middle.yaml\nlora: {alpha: 4}\n")
        top = load_profile(str(tmp_path / "top.yaml"))
        assert (top.profile, top.seed, top.lora.rank, top.lora.alpha) == ("top", 3, 4, 4)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("base: tine", r"profile 'tine' is unknown; did you mean 'tiny'"),
            ("base: gone.yaml", r"gone\.yaml does not exist"),
            ("base: mine.yaml", r"mine\.yaml: its bases lead back to it"),
            ("base: tiny\nlora: 3", r"mine\.yaml\.lora is 3; its base has \{'rank': 8"),
            ("base: tiny\nseed: {a: 1}", r"mine\.yaml: .*seed|mine\.yaml\.seed is"),
            ("base: tiny\nlora: {rnak: 3}", r"mine\.yaml\.lora: key 'rnak'.*'rank'"),
        ],
    )
    def test_a_wrong_one_is_named(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            load_profile(str(tmp_path / "mine.yaml"))


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

    def test_how_it_is_scored_changes_in_its_file(self, tmp_path: Path) -> None:
        save_config(load_profile("tiny"), tmp_path / "config.yaml")
        with pytest.raises(InputError, match=r"change it in .*config\.yaml, and the same command"):
            load_config(tmp_path, ["evaluate.judge=openai"])

    def test_a_folder_without_a_run_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"there is no run at .*mera-ds init"):
            load_config(tmp_path / "nowhere")
        (tmp_path / "study/one").mkdir(parents=True)
        save_config(load_profile("tiny"), tmp_path / "study/one/config.yaml")
        with pytest.raises(InputError, match=r"no run at .*it holds runs: say .*/study/\*$"):
            load_config(tmp_path / "study")


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
