"""Models of an exact architecture with random weights, and rows for them; nobody's file is needed.

What is built is what a training step builds: the same classes, options and engine. Only weights
and samples are drawn instead of read.
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from mera_ds.batch import Batch, Sample
from mera_ds.config import Dtype, RunConfig
from mera_ds.distributed import World
from mera_ds.model.backbone import DTYPES, choose_attention, prepare_backbone
from mera_ds.model.build import move_to
from mera_ds.model.connectors import build_connector
from mera_ds.model.encoders import Encoder, build_encoder
from mera_ds.model.encoders.beats_network import BeatsConfig, BeatsNetwork
from mera_ds.model.encoders.clip import VIT_L_14_336
from mera_ds.model.encoders.point_bert_network import PointBertConfig, PointBertNetwork
from mera_ds.model.lora import attach_lora
from mera_ds.model.mllm import MultimodalLM
from mera_ds.model.trainable import set_trainable
from mera_ds.plan import LORA, connector_set
from mera_ds.train.engine import Engine

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Rows:
    """What the rows of a micro-batch hold, in tokens; all are equally long."""

    count: int
    media: int
    text: int
    labels: int

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.media + self.text + self.labels

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.count * self.length


def random_backbone(shape: Mapping[str, Any], config: RunConfig, device: str) -> Any:
    """Return a Llama of that shape in the configured dtype, drawn on the device."""
    settings = LlamaConfig(**shape, bos_token_id=None, eos_token_id=0, pad_token_id=None)
    attention, _ = choose_attention(config.backbone)
    with torch.device(device):
        llm = AutoModelForCausalLM.from_config(
            settings, dtype=DTYPES[config.backbone.dtype], attn_implementation=attention
        )
    prepare_backbone(llm, config.backbone)
    return llm


def _random(network: nn.Module, dtype: Dtype = "fp32") -> dict[str, Tensor]:
    """Return a network's state with small positive numbers, which suit variances, too."""
    return {
        name: torch.rand(tensor.shape).mul_(0.02).to(DTYPES[dtype])
        if tensor.is_floating_point()
        else torch.zeros_like(tensor)
        for name, tensor in network.state_dict().items()
    }


def write_clip(folder: Path, **changes: Any) -> Path:
    """Write a CLIP image tower with random weights, ViT-L/14-336 but for the changes."""
    folder.mkdir(parents=True)
    values = {**VIT_L_14_336, **changes}
    network = CLIPVisionModel(CLIPVisionConfig(**values))
    state = _random(getattr(network, "vision_model", network), "fp16")
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **values}))
    return folder


def write_beats(path: Path, **changes: Any) -> Path:
    """Write a BEATs with random weights, iter3+ but for the changes."""
    config = BeatsConfig(**changes)
    state = _random(BeatsNetwork(config))
    save_file(state, path, {"cfg": json.dumps(dataclasses.asdict(config))})
    return path


def write_point_bert(path: Path, **changes: Any) -> Path:
    """Write a Point-BERT with random weights, v1.2 but for the changes."""
    save_file(_random(PointBertNetwork(PointBertConfig(**changes))), path)
    return path


def build(
    config: RunConfig,
    shape: Mapping[str, Any],
    weights: Mapping[str, Path],
    modalities: Sequence[str],
    device: str,
    *,
    lora: bool,
) -> MultimodalLM:
    """Return the model that a step of the run would build, on the device.

    Args:
        config: the profile.
        shape: the backbone's settings as a `LlamaConfig` takes them.
        weights: encoder kind -> file or folder of its random weights.
        modalities: which encoders and connectors it has.
        device: where it lies.
        lora: whether LoRA factors are attached.
    """
    encoders: dict[str, Encoder] = {}
    for name in modalities:
        encoder = config.modalities[name].encoder
        encoders[name] = build_encoder(encoder.kind, encoder.options, weights.get(encoder.kind))
    llm = random_backbone(shape, config, device)
    connectors = {}
    for name, encoder in encoders.items():
        part = config.modalities[name].connector
        connectors[name] = build_connector(
            part.kind, part.options, encoder.feature_dim, shape["hidden_size"]
        )
    if lora:
        attach_lora(llm, config.lora)
    model = MultimodalLM(llm, connectors, encoders, config.prompt.max_length)
    move_to(model, encoders, device)
    return model


def make_batch(
    modality: str, media: Sequence[Tensor], rows: Rows, vocabulary: int, *, encoded: bool
) -> Batch:
    """Return a micro-batch of random texts around the given media or features."""
    draw = torch.Generator().manual_seed(rows.length)
    samples = []
    for number, medium in enumerate(media):
        ids = torch.randint(1, vocabulary, (rows.text + rows.labels,), generator=draw).tolist()
        cut = rows.text // 2
        samples.append(
            Sample(
                id=f"synthetic/{number}#0",
                modality=modality,
                prefix_ids=tuple(ids[:cut]),
                suffix_ids=tuple(ids[cut : rows.text]),
                answer_ids=tuple(ids[rows.text :]),
                media=medium,
                encoded=encoded,
            )
        )
    return Batch(tuple(samples), (True,) * len(samples))


def trained_sets(model: MultimodalLM, phase: str) -> list[str]:
    """Return what a phase trains: all connectors that the model has, and LoRA in tune."""
    connectors = [connector_set(name) for name in model.connectors]
    return [*connectors, LORA] if phase == "tune" else connectors


def make_engine(config: RunConfig, model: MultimodalLM, phase: str, world: World) -> Engine:
    """Return the engine that a step of this phase has."""
    sets = set_trainable(model, trained_sets(model, phase))
    settings = config.phase(phase)
    model.train()
    return Engine(model, sets, settings, config.execution, config.backbone.dtype, world)


@dataclass(frozen=True)
class Trained:
    """What some steps came to."""

    seconds: float
    """Of one step."""
    applied: bool
    """Whether the last one was applied, not skipped for fp16's loss scale."""


def train(
    engine: Engine, rates: Mapping[str, float], batches: Sequence[Batch], steps: int, device: str
) -> Trained:
    """Take some optimizer steps, each over all micro-batches."""
    tokens = sum(batch.supervised_tokens for batch in batches)
    applied = False
    synchronise(device)
    started = time.perf_counter()
    for _ in range(steps):
        for number, batch in enumerate(batches):
            engine.backward(batch, tokens, number == len(batches) - 1)
        applied = engine.step(rates)
    synchronise(device)
    return Trained((time.perf_counter() - started) / steps, applied)


def synchronise(device: str) -> None:
    """Wait until the device has done what it was asked."""
    if device != "cpu":
        torch.cuda.synchronize()
