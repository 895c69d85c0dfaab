"""Estimates against what is known: published sizes, real modules, a real step, a real run."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from chat_backbones import FAMILIES, write_backbone
from transformers import AutoModelForCausalLM

from mera_ds.cli import main
from mera_ds.config import LoraConfig, load_config, load_profile, save_config
from mera_ds.errors import DataError, InputError
from mera_ds.estimate.device import A6000, measure_speed
from mera_ds.estimate.memory import Training, kept_per_token, total, training_memory
from mera_ds.estimate.parts import KNOWN, connector_part, encoder_part
from mera_ds.estimate.shape import Shape, read_shape
from mera_ds.estimate.steps import Estimator, seconds_per_step
from mera_ds.estimate.work import training_flops
from mera_ds.methods import make_plan
from mera_ds.model.lora import attach_lora, lora_parameters
from mera_ds.plan import save_plan

LLAMA = Path("Meta-Llama-3-8B-Instruct")
GB = 1e9


@pytest.fixture(scope="module")
def llama() -> Shape:
    return read_shape(LLAMA)


def tune(shape: Shape, **changes: object) -> Training:
    """Return the paper's tune step at batch 4."""
    step = Training(
        shape=shape,
        dtype="fp16",
        lora_rank=128,
        dropout=0.05,
        recompute=True,
        rows=4,
        length=640,
        labels=60,
        connectors=20_979_712,
        encoders=0.61e9,
    )
    return dataclasses.replace(step, **changes)  # type: ignore[arg-type]


class TestShape:
    def test_the_papers_model_has_its_published_size(self, llama: Shape) -> None:
        assert llama.parameters == 8_030_261_248
        assert llama.lora(128) == 335_544_320

    @pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen2"])
    def test_it_counts_what_a_model_has(self, tmp_path: Path, name: str) -> None:
        folder = write_backbone(tmp_path / name, name)
        model = AutoModelForCausalLM.from_pretrained(folder)
        shape = read_shape(folder)
        sizes = [entry.numel() for entry in model.parameters()]
        extra = 2 * shape.head_width * shape.layers if name == "qwen3" else 0  # norms of q and k
        assert shape.parameters + extra == sum(sizes)
        attach_lora(model, LoraConfig(rank=4))
        assert shape.lora(4) == sum(entry.numel() for entry in lora_parameters(model).values())

    def test_an_unknown_one_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"config\.json is missing, so the backbone's size"):
            read_shape(tmp_path)
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(DataError, match=r"does not state the size .*num_attention_heads"):
            read_shape(tmp_path)


class TestMemory:
    def test_the_parts_of_the_papers_step(self, llama: Shape) -> None:
        parts = training_memory(tune(llama), "cuda")
        assert parts["backbone"] == pytest.approx(16.06 * GB, rel=1e-3)
        assert parts["trainables"] == pytest.approx(0.713 * GB, rel=1e-2)
        assert parts["optimizer"] == pytest.approx(12 * 356_524_032, rel=1e-6)
        assert 23 * GB < total(parts) < 26 * GB

    @pytest.mark.parametrize(
        ("changes", "least", "most"),
        [
            ({"moment_bytes": 2.0, "embedding_on_device": False}, 2.9, 3.5),
            ({"lora_rank": 0}, 5.0, 6.5),
            ({"dropout": 0.0}, 0.0, 0.5),
        ],
    )
    def test_what_a_setting_saves(
        self, llama: Shape, changes: dict[str, object], least: float, most: float
    ) -> None:
        whole = total(training_memory(tune(llama), "cuda"))
        saved = whole - total(training_memory(tune(llama, **changes), "cuda"))
        assert least * GB <= saved <= most * GB

    def test_recomputation_goes_from_none_over_layers_to_all(self, llama: Shape) -> None:
        ways = ("none", False, 8, 24, "selective", "all", True)
        kept = [training_memory(tune(llama, recompute=way), "cuda")["activations"] for way in ways]
        assert kept[0] == kept[1] > kept[2] > kept[3] > kept[-1] == kept[-2]
        assert kept[1] > kept[4] > kept[5]

    def test_of_full_fine_tuning_ranks_share_all_but_activations(self, llama: Shape) -> None:
        """16 bytes a weight in bf16: itself, its gradient, its master, two moments."""
        full = {"lora_rank": 0, "dropout": 0.0, "full": True, "connectors": 0, "dtype": "bf16"}
        names = ("backbone", "trainables", "gradients", "optimizer")
        for zero, ranks, per_weight in ((1, 1, 16), (2, 8, 2 + 14 / 8), (3, 8, 16 / 8)):
            parts = training_memory(tune(llama, zero=zero, ranks=ranks, **full), "cuda")
            found = sum(parts[name] for name in names)
            assert found == pytest.approx(per_weight * llama.parameters, rel=1e-6)
            assert (parts["buffers"] > 0) == (zero == 3)

    @pytest.mark.parametrize(
        ("rank", "dropout", "full"),
        [(0, 0.0, False), (8, 0.0, False), (8, 0.1, False), (0, 0.0, True)],
    )
    def test_it_counts_what_autograd_keeps(
        self, tmp_path: Path, rank: int, dropout: float, full: bool
    ) -> None:
        """The difference of one layer, tensor by tensor, on a CPU."""
        folder = write_backbone(tmp_path / "llama", "llama")
        shape = read_shape(folder)
        kept = []
        for layers in (1, 2):
            llm = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=layers).train()
            llm.requires_grad_(full)
            if rank:
                attach_lora(llm, LoraConfig(rank=rank, dropout=dropout))
            kept.append(_saved_bytes(llm, torch.randn(2, 16, shape.width, requires_grad=True)))
        step = tune(shape, dtype="fp32", lora_rank=rank, dropout=dropout, full=full)
        log_sums = shape.heads * 4 + 2 * 4  # of the attention, and of both norms
        assert kept[1] - kept[0] == 32 * (kept_per_token(step, "cpu") + log_sums)


def _saved_bytes(llm: torch.nn.Module, embeddings: torch.Tensor) -> int:
    """Return the bytes of all tensors that a forward pass keeps, weights left out."""
    weights = {entry.untyped_storage().data_ptr() for entry in llm.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = llm.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        hidden.sum()
    return sum(
        entry.untyped_storage().nbytes() for place, entry in kept.items() if place not in weights
    )


def test_operations_are_those_of_the_model(llama: Shape) -> None:
    """Two for each weight forward and backward; a row of 640 tokens of which 16 are learned."""
    row = training_flops(llama, 640, 16, 128, recompute=False)
    assert row / 640 == pytest.approx(4 * 6.98e9 + 6 * 0.3355e9, rel=0.02)
    whole = training_flops(llama, 640, 16, 0, recompute=False, full=True)
    assert whole / 640 == pytest.approx(6 * 6.98e9, rel=0.03)
    again = training_flops(llama, 640, 16, 128, recompute=True)
    assert (again - row) / 640 == pytest.approx(2 * 7.31e9, rel=0.03)


def test_the_papers_parts_are_what_their_kinds_give() -> None:
    paper = load_profile("a6000-fp16")
    tokens = {}
    for name, settings in paper.modalities.items():
        assert settings.encoder.kind in KNOWN
        tokens[name] = connector_part(settings, encoder_part(settings, Path()), 64)[1]
    assert tokens == {"image": 576, "video": 576, "audio": 32, "pointcloud": 513}


def test_the_papers_card_stands_in_where_there_is_no_gpu() -> None:
    found = measure_speed("fp16", 0.05)
    assert (found is A6000) == (not torch.cuda.is_available())
    assert measure_speed("fp32", 0.05).flops > 1e9


def test_the_papers_run_is_near_the_papers_hours(tmp_path: Path) -> None:
    """61 GPU hours for MERA with 10 % on an A6000 (paper, table 3); inference in 17.71 GB."""
    config = load_profile("a6000-fp16")
    estimator = Estimator(config, tmp_path, A6000)
    found = {step.name: estimator.estimate(step) for step in make_plan(config).steps}
    hours = sum(entry.seconds for name, entry in found.items() if "evaluate" not in name) / 3600
    assert 45 < hours < 75
    assert found["01-image/tune"].samples == 108_000
    assert found["01-image/align"].steps == 641
    assert found["01-image/evaluate"].memory == pytest.approx(17.71 * GB, rel=0.05)
    assert all(entry.from_paper for entry in found.values() if entry.samples)
    judged = found["04-pointcloud/evaluate"]
    assert judged.judge_calls == 4000
    assert judged.dollars is not None
    assert 0.1 < judged.dollars < 2


def test_full_fine_tuning_keeps_and_merges_whole_backbones(tmp_path: Path) -> None:
    config = load_profile("8xh100-zero3-full")
    estimator = Estimator(config, tmp_path, A6000)
    found = {step.name: estimator.estimate(step) for step in make_plan(config).steps}
    weights = 2 * 8_030_261_248
    tune = found["02-video/tune"]
    assert tune.disk == pytest.approx(weights, rel=0.01)
    assert tune.disk_meanwhile == pytest.approx(3 * 12 * weights / 2, rel=0.01)  # one is written
    assert 20 * GB < tune.memory < 40 * GB
    assert found["02-video/merge"].disk == weights
    assert found["02-video/merge"].seconds > 60
    assert found["02-video/realign"].disk < GB


class TestPlan:
    def test_every_step_has_an_estimate(
        self, make_tiny_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = make_tiny_run("order=[image, audio]")
        assert main(["plan", str(run)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "48 samples, 20 steps, 0.5 GB of memory" in lines[2]
        assert "on disk (and " in lines[2]
        assert lines[-2].startswith("  estimated in all: ")
        assert "measured on this machine" in lines[-1]

    def test_steps_that_were_done_tell_the_time(
        self, make_tiny_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = make_tiny_run("order=[image]")
        rows = [{"name": "01-image/tune", "time": 100 + 7.0 * step} for step in range(6)]
        text = "\n".join(json.dumps(row) for row in rows)
        (run / "metrics.jsonl").write_text(text + '\n{"name": "01-ima')
        assert seconds_per_step(run, "01-image/tune") == 7
        assert seconds_per_step(run, "01-image/align") is None
        assert main(["plan", str(run)]) == 0
        assert "3 min 30 s (measured)" in capsys.readouterr().out

    def test_what_is_not_known_is_said(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = load_profile("a6000-fp16", ["backbone.path=/nowhere/model"])
        save_plan(make_plan(config), tmp_path / "plan.json")
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path) == config
        assert main(["plan", str(tmp_path)]) == 0
        assert "no estimates: /nowhere/model/config.json is missing" in capsys.readouterr().out
