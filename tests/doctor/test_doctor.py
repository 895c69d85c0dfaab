"""What `doctor` finds in folders that are whole, incomplete, damaged, or of another network."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from chat_backbones import write_backbone
from http_server import serving
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from mera_ds.config import RunConfig, load_config, load_profile
from mera_ds.doctor import Finding, environment, examine, missing_paths, weights
from mera_ds.files import sha256_file
from mera_ds.shards import remote
from mera_ds.shards.damage import quarantine_folder

MakeRun = Callable[..., Path]
BACKBONE = "backbone.path={weights}/llama"
COMPONENTS = (
    'modalities.image.encoder={kind: clip-vit, weights: "{weights}/clip"}',
    'modalities.video.encoder={kind: clip-vit-frames, weights: "{weights}/clip"}',
    'modalities.audio.encoder={kind: beats, weights: "{weights}/beats.pt"}',
    'modalities.audio.connector={kind: qformer, weights: "{weights}/bert"}',
    'modalities.pointcloud.encoder={kind: point-bert, weights: "{weights}/point_bert_v1.2.pt"}',
)
MODALITIES = ("image", "video", "audio", "pointcloud")
DATA = [f"modalities.{name}.data=['{{shards}}/{name}']" for name in MODALITIES]


@pytest.fixture(scope="module")
def whole(tiny_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `weights` and `shards`, in the published formats but small."""
    root = tmp_path_factory.mktemp("whole")
    folder = root / "weights"
    write_backbone(folder / "llama", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    (folder / "llama/model.safetensors").unlink()
    model.save_pretrained(folder / "llama", max_shard_size="40KB")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2}
    clip = CLIPVisionConfig(image_size=8, patch_size=4, **sizes, **heads)
    CLIPVisionModel(clip).save_pretrained(folder / "clip")
    BertModel(BertConfig(vocab_size=20, **sizes, **heads)).save_pretrained(folder / "bert")
    torch.save({"cfg": {}, "model": {"a": torch.ones(64)}}, folder / "beats.pt")
    torch.save({"state_dict": {"a": torch.ones(64)}}, folder / "point_bert_v1.2.pt")
    shutil.copytree(tiny_template / "data", root / "shards")
    return root


@pytest.fixture
def place(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy that a test may damage, in which the places `{weights}`, `{shards}` lie."""
    root = Path(shutil.copytree(whole, tmp_path / "place"))
    monkeypatch.setenv("MERA_WEIGHTS", str(root / "weights"))
    monkeypatch.setenv("MERA_SHARDS", str(root / "shards"))
    monkeypatch.setattr(weights, "BEATS_SHA256", sha256_file(root / "weights/beats.pt"))
    return root


@pytest.fixture
def config() -> RunConfig:
    return load_profile("tiny", [BACKBONE, *COMPONENTS, *DATA])


def by_name(config: RunConfig, run: Path | None = None) -> dict[str, Finding]:
    return {finding.what: finding for finding in examine(config, run)}


def bad(config: RunConfig) -> dict[str, tuple[str, str]]:
    """Return state and detail of everything that is not fine."""
    found = by_name(config).items()
    return {name: (entry.state, entry.detail) for name, entry in found if not entry.fine}


class TestWhole:
    def test_everything_is_found_and_described(self, config: RunConfig, place: Path) -> None:
        found = by_name(config)
        assert bad(config) == {}
        assert found["backbone: configuration"].detail == (
            "LlamaForCausalLM, 2 layers of width 32, vocabulary of 380"
        )
        assert "chat template in" in found["backbone: tokenizer"].detail
        shards = [name for name in found if name.startswith("backbone: model-")]
        assert len(shards) >= 3
        assert (
            "2 layers of width 16"
            in found["image encoder (clip-vit), video encoder (clip-vit-frames)"].detail
        )
        assert "SHA-256 as published" in found["audio encoder (beats)"].detail
        assert "media" in found["audio shards audio/train"].detail
        assert len([name for name in found if "shards" in name]) == 4 * 2

    def test_another_audio_file_may_be_used(self, config: RunConfig, place: Path) -> None:
        torch.save({"model": {"a": torch.zeros(64)}}, place / "weights/beats.pt")
        assert bad(config) == {}
        detail = by_name(config)["audio encoder (beats)"].detail
        assert "not the published AS2M file" in detail

    @pytest.mark.parametrize("alone", [False, True])
    def test_a_bert_in_torchs_format(self, config: RunConfig, place: Path, alone: bool) -> None:
        folder = place / "weights/bert"
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        if alone:
            (folder / "pytorch_model.bin").rename(place / "bert.bin")
            shutil.rmtree(folder)
            (place / "bert.bin").rename(place / "weights/bert.bin")
            weights = 'modalities.audio.connector={kind: qformer, weights: "{weights}/bert.bin"}'
            config = load_profile("tiny", [BACKBONE, *COMPONENTS, *DATA, weights])
        assert bad(config) == {}
        assert ".bin, " in by_name(config)["audio connector (qformer)"].detail

    def test_what_init_makes_comes_later(self, cache: Path) -> None:
        states = {entry.state for entry in examine(load_profile("tiny"), None)}
        assert states == {"later"}

    def test_a_run_of_the_profile_tiny_has_everything(self, make_tiny_run: MakeRun) -> None:
        run = make_tiny_run()
        config = load_config(run)
        assert all(entry.state == "found" for entry in examine(config, run))
        assert missing_paths(config, run) == []
        (run / "data/audio/test/index.json").unlink()
        assert missing_paths(config, run) == [run / "data/audio/test/index.json"]

    def test_the_weights_of_the_pocket_profile_come_from_its_command(self, cache: Path) -> None:
        found = [entry for entry in examine(load_profile("pocket"), None) if not entry.fine]
        assert {entry.source for entry in found} == {"'mera-ds pocket fetch'"}


class TestMissing:
    def test_without_any_file_everything_is_named_with_its_source(
        self, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MERA_WEIGHTS", str(tmp_path / "w"))
        monkeypatch.setenv("MERA_SHARDS", str(tmp_path / "s"))
        found = by_name(config)
        assert {entry.state for entry in found.values()} == {"missing"}
        assert "tokenizer.json" in found["backbone"].detail
        assert found["audio connector (qformer)"].source.startswith("google-bert/bert-base-uncased")
        shards = found["audio shards audio/train"]
        assert shards.source == f"mera-ds shards build audio --source DIR --out {tmp_path / 's'}"
        assert shards.path == tmp_path / "s/audio/train"

    @pytest.mark.parametrize(
        ("file", "what", "detail"),
        [
            ("llama/config.json", "backbone: configuration", "config.json is missing"),
            ("llama/tokenizer.json", "backbone: tokenizer", "it holds none of tokenizer.json"),
            ("llama/chat_template.jinja", "backbone: tokenizer", "no chat template"),
            ("clip/model.safetensors", "image encoder", "it holds none of model.safetensors"),
            ("clip/config.json", "image encoder", "config.json is missing"),
            ("bert/model.safetensors", "audio connector", "it holds none of model.safetensors"),
            ("beats.pt", "audio encoder (beats)", "it does not exist"),
        ],
    )
    def test_a_file_is_named(
        self, file: str, what: str, detail: str, config: RunConfig, place: Path
    ) -> None:
        (place / "weights" / file).unlink()
        ((name, (state, said)),) = bad(config).items()
        assert (name[: len(what)], state) == (what, "missing")
        assert detail in said

    def test_a_shard_of_the_backbone_is_named(self, config: RunConfig, place: Path) -> None:
        shard = sorted((place / "weights/llama").glob("model-*.safetensors"))[1]
        shard.unlink()
        assert bad(config) == {f"backbone: {shard.name}": ("missing", "it does not exist")}

    def test_a_split_is_named(self, config: RunConfig, place: Path) -> None:
        shutil.rmtree(place / "shards/video/test")
        assert list(bad(config)) == ["video shards video/test"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


class TestWrong:
    @pytest.mark.parametrize(
        ("file", "what", "detail"),
        [
            ("clip/model.safetensors", "image encoder", "its header says"),
            ("bert/model.safetensors", "audio connector", "its header says"),
            ("point_bert_v1.2.pt", "pointcloud encoder", "is cut off; copy it again"),
            ("beats.pt", "audio encoder", "is cut off; copy it again"),
            ("llama/config.json", "backbone: configuration", "config.json"),
        ],
    )
    def test_a_file_that_is_cut_off(
        self, file: str, what: str, detail: str, config: RunConfig, place: Path
    ) -> None:
        cut(place / "weights" / file)
        ((name, (state, said)),) = bad(config).items()
        assert (name[: len(what)], state) == (what, "wrong")
        assert detail in said

    def test_a_shard_of_the_backbone_that_is_cut_off(self, config: RunConfig, place: Path) -> None:
        shard = sorted((place / "weights/llama").glob("model-*.safetensors"))[1]
        size = shard.stat().st_size
        cut(shard)
        ((name, (state, said)),) = bad(config).items()
        assert (name, state) == (f"backbone: {shard.name}", "wrong")
        assert f"has {size - 10} bytes, its header says {size}" in said

    def test_a_tar_that_is_cut_off(self, config: RunConfig, place: Path) -> None:
        cut(place / "shards/audio/train/00000.tar")
        ((name, (state, said)),) = bad(config).items()
        assert (name, state) == ("audio shards audio/train", "wrong")
        assert "audio/train/00000.tar has " in said

    def test_a_tar_that_is_cut_off_and_in_quarantine(self, config: RunConfig, place: Path) -> None:
        train = place / "shards/audio/train"
        whole = (train / "00000.tar").read_bytes()
        (train / "00000.tar").write_bytes(whole[: len(whole) // 2])
        lost = len(quarantine_folder(train).samples)
        assert lost > 0
        found = by_name(config)["audio shards audio/train"]
        assert found.state == "found"
        assert found.detail.endswith(f", {lost} media in quarantine")
        (train / "00000.tar").write_bytes(whole)
        assert "its quarantine says" in bad(config)["audio shards audio/train"][1]

    def test_shards_of_another_modality(self, config: RunConfig, place: Path) -> None:
        shutil.rmtree(place / "shards/audio")
        shutil.copytree(place / "shards/image", place / "shards/audio")
        found = bad(config)
        assert set(found) == {"audio shards audio/train", "audio shards audio/test"}
        assert found["audio shards audio/test"][1] == "it holds modality 'image', not 'audio'"

    def test_a_file_of_another_network(self, config: RunConfig, place: Path) -> None:
        folder = place / "weights"
        shutil.copy(folder / "bert/model.safetensors", folder / "clip/model.safetensors")
        assert "holds no tensor 'embeddings.class_embedding'" in next(iter(bad(config).values()))[1]

    def test_an_architecture_that_is_no_language_model(
        self, config: RunConfig, place: Path
    ) -> None:
        path = place / "weights/llama/config.json"
        text = path.read_text().replace("LlamaForCausalLM", "LlamaModel")
        path.write_text(text)
        assert bad(config)["backbone: configuration"][1] == (
            "config.json describes LlamaModel, expected a …ForCausalLM"
        )

    @pytest.mark.parametrize(
        ("key", "value", "said"),
        [
            ("vocab_size", 999, "the embedding has shape (380, 32), config.json says (999, 32)"),
            ("num_hidden_layers", 3, "the files hold 2 layers, config.json says 3"),
        ],
    )
    def test_weights_that_do_not_fit_the_configuration(
        self, key: str, value: int, said: str, config: RunConfig, place: Path
    ) -> None:
        path = place / "weights/llama/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
        assert bad(config) == {"backbone: tensors": ("wrong", said)}

    def test_a_folder_named_as_the_papers_backbone_that_is_another(
        self, config: RunConfig, place: Path
    ) -> None:
        (place / "weights/llama").rename(place / "weights/Meta-Llama-3-8B-Instruct")
        other = load_profile("tiny", ["backbone.path={weights}/Meta-Llama-3-8B-Instruct"])
        said = by_name(other)["backbone: configuration"]
        assert said.state == "wrong"
        assert said.detail == "config.json: hidden_size is 32, expected 4096"
        assert said.source.startswith("meta-llama/Meta-Llama-3-8B-Instruct")


class TestRemoteShards:
    def test_the_indexes_behind_a_url_are_examined(
        self, place: Path, make_tiny_run: MakeRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MERA_CACHE", str(place / "cache"))
        shutil.rmtree(place / "shards/audio/test")
        with serving(place / "shards") as server:
            url = f"{server}/audio"
            run = make_tiny_run(f"modalities.audio.data=['{url}/']")
            config = load_config(run)
            found = by_name(config, run)
            train, test = (found[f"audio shards audio/{split}"] for split in ("train", "test"))
            assert (train.path, train.state) == (f"{url}/train", "found")
            assert "media" in train.detail
            assert (test.path, test.state) == (f"{url}/test", "missing")
            assert f"{url}/test has no index.json" in test.detail
            assert missing_paths(config, run) == [f"{url}/test/index.json"]
        assert not list((place / "cache").rglob("*.tar"))

    def test_a_server_that_is_not_there(
        self, place: Path, make_tiny_run: MakeRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MERA_CACHE", str(place / "cache"))
        monkeypatch.setattr(remote, "RETRY_SECONDS", 0.0)
        with serving(place) as url:
            pass
        run = make_tiny_run(f"modalities.audio.data=['{url}/audio']")
        finding = by_name(load_config(run), run)["audio shards audio/train"]
        assert (finding.path, finding.state) == (f"{url}/audio/train", "wrong")
        assert f"{url}/audio/train/index.json could not be fetched" in finding.detail

    def test_a_command_is_never_run(self, config: RunConfig, place: Path) -> None:
        changed = load_profile("tiny", ["modalities.audio.data=['pipe:cat x']"])
        finding = by_name(changed)["audio shards pipe:cat x/train"]
        assert finding.state == "missing"
        assert "never run" in finding.detail


class TestEnvironment:
    def test_the_key_of_the_judge_is_needed_and_never_shown(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        judged = load_profile("tiny", ["evaluate.judge=openai"])
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        facts = {fact.name: fact for fact in environment(judged, tmp_path)}
        assert not facts["OPENAI_API_KEY"].fine
        assert all(fact.fine for name, fact in facts.items() if name != "OPENAI_API_KEY")
        assert all(fact.fine for fact in environment(load_profile("tiny"), tmp_path))
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        facts = {fact.name: fact for fact in environment(judged, tmp_path)}
        assert facts["OPENAI_API_KEY"].value == "set"
        assert "sk-secret" not in str(facts)

    def test_it_tells_versions_space_and_devices(self, tmp_path: Path) -> None:
        facts = {fact.name: fact.value for fact in environment(None, tmp_path / "not/yet")}
        assert facts["torch"].startswith(torch.__version__)
        assert facts["disk of the run"].endswith(f"GB free at {tmp_path}")
        assert {"python", "deepspeed", "GPU", "attention", "java", "memory"} <= facts.keys()

    def test_flash_attention_that_is_asked_for_and_missing(self, tmp_path: Path) -> None:
        config = load_profile("tiny", ["backbone.attention=flash_attention_2"])
        facts = {fact.name: fact for fact in environment(config, tmp_path)}
        assert not facts["attention"].fine

    def test_graphics_cards_are_those_that_the_driver_names(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\necho 'NVIDIA RTX A6000, 49140 MiB'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        facts = {fact.name: fact.value for fact in environment(None, tmp_path)}
        assert facts["GPU"] == "NVIDIA RTX A6000, 49140 MiB"
