"""What `gpu.py` measures; each section is one function from a size and the folder of weights."""

import atexit
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from llava_loop import LlavaStyle, train_with_hf
from synthetic import (
    LLAMA_3_8B,
    Rows,
    build,
    make_batch,
    make_engine,
    synchronise,
    train,
    trained_sets,
    write_beats,
    write_clip,
    write_point_bert,
)
from torch import Tensor

from mera_ds.batch import Sample
from mera_ds.config import RunConfig, load_profile
from mera_ds.distributed import World, ensure_launcher_variables, process_group
from mera_ds.estimate.device import measure_speed
from mera_ds.estimate.shape import shape_of
from mera_ds.estimate.work import training_flops
from mera_ds.model.decoding import StaticDecoder, make_decoder, next_token
from mera_ds.model.mllm import MultimodalLM

Figures = dict[str, Any]
Section = Callable[[str, Path], Figures]

ALL = ("image", "video", "audio", "pointcloud")
FAST = "backbone.gradient_checkpointing=selective"
"""Memory spent on recomputing no matrix product."""
SMALL_LLAMA = {
    **LLAMA_3_8B,
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "vocab_size": 512,
}
SHAPES = {"full": LLAMA_3_8B, "small": SMALL_LLAMA}
BEATS = {
    "input_patch_size": 16,
    "deep_norm": True,
    "relative_position_embedding": True,
    "max_distance": 800,
    "gru_rel_pos": True,
}
SMALL_BEATS = {
    **BEATS,
    "encoder_layers": 2,
    "embed_dim": 32,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 64,
    "encoder_attention_heads": 4,
    "conv_pos": 8,
    "conv_pos_groups": 4,
    "num_buckets": 32,
}
SMALL_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 112,
}
SMALL_POINT_BERT = {"trans_dim": 32, "depth": 2, "num_heads": 4, "num_group": 16, "group_size": 8}
SMALL = (
    "backbone.dtype=fp32",
    "modalities.image.encoder.options.dtype=fp32",
    "modalities.video.encoder.options.dtype=fp32",
    "modalities.audio.connector.options={hidden: 32, layers: 2, heads: 2}",
    *(f"modalities.pointcloud.encoder.options.{k}={v}" for k, v in SMALL_POINT_BERT.items()),
    "lora.rank=8",
)
MICRO_BATCHES = 4
"""Of 4 rows: the paper's batch of 16."""
STEPS = {"full": 3, "small": 1}
NEW_TOKENS = {"full": 64, "small": 12}
ANSWER = 14
"""Tokens of an answer."""
CONTEXT = 700


def write_weights(folder: Path, size: str) -> None:
    """Write random weights of the encoders."""
    small = size == "small"
    write_clip(folder / "clip", **(SMALL_CLIP if small else {}))
    write_beats(folder / "beats.safetensors", **(SMALL_BEATS if small else BEATS))
    write_point_bert(folder / "points.safetensors", **(SMALL_POINT_BERT if small else {}))


def device() -> str:
    """Return where everything runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def configure(profile: str, size: str, *overrides: str) -> RunConfig:
    """Return a profile at a size; connectors start from nothing."""
    bare = "modalities.audio.connector.weights=null"
    return load_profile(profile, [bare, *(SMALL if size == "small" else ()), *overrides])


def make_model(
    config: RunConfig, size: str, weights: Path, modalities: Sequence[str], *, lora: bool
) -> MultimodalLM:
    """Build the model on the device."""
    files = {
        "clip-vit": weights / "clip",
        "clip-vit-frames": weights / "clip",
        "beats": weights / "beats.safetensors",
        "point-bert": weights / "points.safetensors",
    }
    torch.manual_seed(0)
    return build(config, SHAPES[size], files, modalities, device(), lora=lora)


def pictures(model: MultimodalLM, count: int) -> list[Tensor]:
    """Return pictures as CLIP takes them."""
    side = model.encoders["image"].size
    return list(torch.randn(count, 1, 3, side, side, generator=torch.Generator().manual_seed(0)))


def image_rows(model: MultimodalLM, count: int, text: int = 48, labels: int = 16) -> Rows:
    """Return rows with one picture each."""
    return Rows(count, model.encoders["image"].max_tokens, text, labels)


def peak() -> Figures:
    """Return the peak memory since `reset_peak`, in bytes; on a CPU that of the process."""
    if device() == "cuda":
        return {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
        }
    status = Path("/proc/self/status").read_text()
    return {"allocated": 1024 * int(status.partition("VmHWM:")[2].split()[0]), "reserved": 0}


def reset_peak() -> None:
    """Forget the peak so far, and give back what is not used."""
    if device() == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def speed(size: str, weights: Path) -> Figures:
    """Measure matrix products and memory bandwidth."""
    found = measure_speed(
        configure("a6000-fp16", size).backbone.dtype, 2.0 if device() == "cuda" else 0.2
    )
    return {"name": found.name, "flops": found.flops, "bandwidth": found.bandwidth}


_LEFT_OPEN = ExitStack()


def join() -> World:
    """Be the only rank of a process group, which stays: DeepSpeed can't follow into another."""
    world = ensure_launcher_variables()
    if not torch.distributed.is_initialized():
        _LEFT_OPEN.enter_context(process_group(world, 600))
        atexit.register(_LEFT_OPEN.close)
    return world


def training(profile: str, phase: str, modalities: Sequence[str], *overrides: str) -> Section:
    """Return the section that trains a phase with micro-batches of 4 rows with a picture."""

    def section(size: str, weights: Path) -> Figures:
        config = configure(profile, size, *overrides)
        world = join()
        model = make_model(config, size, weights, modalities, lora=phase == "tune")
        rows = image_rows(model, 4)
        vocabulary = SHAPES[size]["vocab_size"]
        batch = make_batch("image", pictures(model, 4), rows, vocabulary, encoded=False)
        batches = [batch] * MICRO_BATCHES
        engine = make_engine(config, model, phase, world)
        rates = dict.fromkeys(trained_sets(model, phase), 1e-6)
        reset_peak()
        # fp16's search for a loss scale skips steps; the optimizer's memory is needed, too.
        tries = 0
        while not train(engine, rates, [batch], 1, device()).applied:
            tries += 1
            if tries == 20:
                raise RuntimeError("no step was applied in 20 tries")
        seconds = train(engine, rates, batches, STEPS[size], device()).seconds
        found = {
            **peak(),
            "seconds": seconds,
            "tokens_per_second": MICRO_BATCHES * rows.tokens / seconds,
            "flops": MICRO_BATCHES * _row_flops(config, size, rows, phase),
            "skipped": tries,
        }
        engine.close()
        return found

    return section


def _row_flops(config: RunConfig, size: str, rows: Rows, phase: str) -> float:
    """Return the model's operations for a micro-batch, recomputation and encoders not counted."""
    rank = config.lora.rank if phase == "tune" else 0
    shape = shape_of(SHAPES[size])
    return rows.count * training_flops(shape, rows.length, rows.labels, rank, recompute=False)


def trainer(size: str, weights: Path) -> Figures:
    """Train the same model on the same rows with HF's Trainer, as LLaVA does."""
    config = configure("a6000-fp16", size)
    model = make_model(config, size, weights, ["image"], lora=True)
    rows = image_rows(model, 4)
    media = pictures(model, 4)
    batch = make_batch("image", media, rows, SHAPES[size]["vocab_size"], encoded=False)
    model.train()
    loop = LlavaStyle(model)
    half = config.backbone.dtype != "fp32"
    with torch.no_grad(), torch.autocast(device(), torch.float16, enabled=half):
        ours = float(model(batch)) / batch.supervised_tokens
        theirs = float(loop(**loop.collate(batch.samples))["loss"])
    if abs(ours - theirs) > (2e-3 if half else 1e-5) * abs(ours):
        raise RuntimeError(f"the losses differ: ours is {ours}, HF's {theirs}")
    reset_peak()
    seconds = train_with_hf(loop, batch.samples, MICRO_BATCHES, STEPS[size] + 1, half=half)
    tokens = MICRO_BATCHES * rows.tokens
    return {**peak(), "seconds": seconds, "tokens_per_second": tokens / seconds, "loss": theirs}


def decode(size: str, weights: Path) -> Figures:
    """Measure the seconds of a token at one row, after a context of 700 tokens."""
    model = make_model(configure("a6000-fp16", size), size, weights, ALL, lora=False).eval()
    llm, new = model.llm, NEW_TOKENS[size]
    context, mask = _context(llm)
    reset_peak()

    def plain(count: int) -> object:
        return llm.generate(
            inputs_embeds=context,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

    found: Figures = {"hf": _per_token(plain, new), "memory": peak()["allocated"]}
    found["weights_read"] = _read_per_token(llm)
    static = StaticDecoder(llm)
    found["static"] = _per_token(lambda count: static(context, mask, count, ()), new)
    return found


def compiled(size: str, weights: Path) -> Figures:
    """Measure the same for the decoder that is one CUDA graph per token."""
    model = make_model(configure("a6000-fp16", size), size, weights, ALL, lora=False).eval()
    context, mask = _context(model.llm)
    if device() == "cuda":
        decoder = make_decoder(model.llm, "compiled", 1)
    else:
        graph = torch.compile(next_token, backend="eager", fullgraph=True)
        decoder = StaticDecoder(model.llm, graph)
    reset_peak()
    seconds = _per_token(lambda count: decoder(context, mask, count, ()), NEW_TOKENS[size])
    return {"compiled": seconds, "memory": peak()["allocated"]}


def _context(llm: Any) -> tuple[Tensor, Tensor]:
    """Return the embeddings of one prompt, and its mask."""
    context = torch.randn(1, CONTEXT, llm.config.hidden_size, device=device()).mul_(0.02)
    return context.to(llm.dtype), torch.ones(1, CONTEXT, dtype=torch.long, device=device())


def _per_token(generate: Callable[[int], object], new: int) -> float:
    """Return the seconds of a token, the prompt not counted; the least of three."""
    generate(new)  # compiles, and sizes the cache
    times = []
    for _ in range(3):
        times.append(_timed(lambda: generate(new)) - _timed(lambda: generate(1)))
    return min(times) / (new - 1)


def _timed(work: Callable[[], object]) -> float:
    synchronise(device())
    started = time.perf_counter()
    work()
    synchronise(device())
    return time.perf_counter() - started


def _read_per_token(llm: Any) -> int:
    """Return the bytes of the weights that one token needs: all but the input embedding."""
    embedding = llm.get_input_embeddings().weight
    whole = sum(entry.numel() * entry.element_size() for entry in llm.parameters())
    return whole - embedding.numel() * embedding.element_size()


class _NoTexts:
    """A tokenizer as far as generating needs one."""

    eos_token_id = 0

    def batch_decode(self, ids: Sequence[Sequence[int]], **options: object) -> list[str]:
        """Return the ids as text."""
        return [" ".join(map(str, row)) for row in ids]


def evaluation(size: str, weights: Path) -> Figures:
    """Measure the seconds of an item: pictures through CLIP, a prompt, an answer of 14 tokens."""
    config = configure("a6000-fp16", size)
    model = make_model(config, size, weights, ["image"], lora=False).eval()
    one, many = {"full": (16, 64), "small": (2, 4)}[size]
    rows = image_rows(model, many, text=64, labels=0)
    media = pictures(model, many)
    batch = make_batch("image", media, rows, SHAPES[size]["vocab_size"], encoded=False)
    size_of_batch = min(32, many)

    def say(samples: Sequence[Sample], rows: int, decode: Any) -> Callable[[], None]:
        def work() -> None:
            for start in range(0, len(samples), rows):
                model.generate(samples[start : start + rows], ANSWER, _NoTexts(), (), decode)

        return work

    found: Figures = {}
    plans: Mapping[str, tuple[int, int, str]] = {
        "batch 1": (one, 1, "eager"),
        "batch 32": (many, size_of_batch, "eager"),
        "batch 32, fixed cache": (many, size_of_batch, "static"),
    }
    for name, (count, rows_of_batch, decode) in plans.items():
        work = say(batch.samples[:count], rows_of_batch, decode)
        say(batch.samples[:rows_of_batch], rows_of_batch, decode)()
        found[name] = _timed(work) / count
    return found


SECTIONS: Mapping[str, Section] = {
    "trainer": trainer,  # first: launchers' variables would have it wrap the model
    "speed": speed,
    "tune": training("a6000-fp16", "tune", ["image"]),
    "evaluation": evaluation,
    "align": training("a6000-fp16", "align", ["image"]),
    "realign": training("a6000-fp16", "realign", ALL),
    "fast": training("a6000-fp16", "tune", ["image"], FAST),
    "24g": training("24g-fp16", "tune", ["image"]),
    "decode": decode,
    "compiled": compiled,  # last: compiling may take minutes
}
