"""Checks of the official weights that encoders and connectors start from, and their sources."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mera_ds.doctor.files import (
    SINGLE,
    Shapes,
    check_torch_file,
    read_object,
    read_shapes,
    require_shapes,
    size_text,
)
from mera_ds.errors import DataError, InputError
from mera_ds.files import sha256_file

TORCH_NAMES = ("pytorch_model.bin",)
BEATS_SHA256 = "d43cbfad4d7b56381c061d7a24774f908d4d94c72961f6eb1d9090ff18cd8d34"


@dataclass(frozen=True)
class Official:
    """Where the weights of a kind come from, and what they look like."""

    source: str
    check: Callable[[Path], str]
    """Describes sound weights; see `look`."""


def check_clip(path: Path) -> str:
    """Check an HF folder of CLIP, or its weight file alone."""
    if path.is_file():
        return _check_file(path, {}, ("",))
    config = read_object(path / "config.json")
    kind = str(config.get("model_type"))
    if kind not in ("clip", "clip_vision_model"):
        raise DataError(f"config.json describes a model of type '{kind}', expected 'clip'")
    vision = config.get("vision_config", config)
    try:
        width, layers, size, patch = (
            int(vision[name])
            for name in ("hidden_size", "num_hidden_layers", "image_size", "patch_size")
        )
    except (KeyError, TypeError, ValueError):
        raise DataError("config.json does not describe CLIP's image transformer") from None
    wanted: Shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": ((size // patch) ** 2 + 1, width),
        f"encoder.layers.{layers - 1}.layer_norm2.weight": (width,),
    }
    described = _check_folder(path, wanted, ("vision_model.", ""))
    return f"{described}, {layers} layers of width {width}, {size} pixels, patches of {patch}"


def check_bert(path: Path) -> str:
    """Check an HF folder of a BERT, or its weight file alone."""
    if path.is_file():
        return _check_file(path, {}, ("",))
    wanted: Shapes = {}
    if (path / "config.json").exists():
        config = read_object(path / "config.json")
        width = config.get("hidden_size")
        if config.get("model_type") != "bert" or not isinstance(width, int):
            raise DataError("config.json describes no BERT")
        wanted = {"encoder.layer.0.attention.self.query.weight": (width, width)}
    return _check_folder(path, wanted, ("bert.", ""))


def check_beats(path: Path) -> str:
    """Check a BEATs file by its tensors, and say of a `.pt` whether it is the published one."""
    wanted: Shapes = {
        "patch_embedding.weight": (512, 1, 16, 16),
        "post_extract_proj.weight": (768, 512),
        "encoder.layers.11.fc1.weight": (3072, 768),
    }
    described = _check_file(path, wanted, ("",))
    if path.suffix != ".pt":
        return described
    if sha256_file(path) == BEATS_SHA256:
        return f"{described}, SHA-256 as published"
    return f"{described}, not the published AS2M file (by its SHA-256)"


def check_point_bert(path: Path) -> str:
    """Check Point-BERT v1.2: the official file, or its tensors in another format."""
    wanted: Shapes = {"cls_token": (1, 1, 384), "reduce_dim.weight": (384, 256)}
    return _check_file(path, wanted, ("module.point_encoder.", "model.point_backbone.", ""))


def check_any(path: Path) -> str:
    """Check weights of which nothing more is known: a file, or a folder of safetensors."""
    if path.is_file():
        return _check_file(path, {}, ("",))
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError("it holds no safetensors file")
    tensors = sum(len(read_shapes(file)) for file in files)
    return f"{size_text(sum(file.stat().st_size for file in files))}, {tensors} tensors"


def _check_folder(folder: Path, wanted: Shapes, prefixes: tuple[str, ...]) -> str:
    for name in (SINGLE, *TORCH_NAMES):
        if (folder / name).is_file():
            return _check_file(folder / name, wanted, prefixes)
    raise InputError(f"it holds none of {', '.join((SINGLE, *TORCH_NAMES))}")


def _check_file(path: Path, wanted: Shapes, prefixes: tuple[str, ...]) -> str:
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return f"{path.name}, {check_torch_file(path)}"
    shapes = read_shapes(path)
    if wanted:
        require_shapes(shapes, wanted, prefixes, path.name)
    return f"{path.name}, {size_text(path.stat().st_size)}, {len(shapes)} tensors"


CLIP = Official("openai/clip-vit-large-patch14-336 on the Hugging Face Hub", check_clip)
POCKET = Official("'mera-ds pocket fetch'", check_any)
OFFICIAL = {
    "clip-vit": CLIP,
    "clip-vit-frames": CLIP,
    "beats": Official(
        "BEATs_iter3+ (AS2M), column 'Pre-Trained Model', in the README of microsoft/unilm, folder "
        f"beats; SHA-256 {BEATS_SHA256}",
        check_beats,
    ),
    "point-bert": Official(
        "point_bert_v1.2.pt of RunsenXu/PointLLM_7B_v1.1_init on the Hugging Face Hub",
        check_point_bert,
    ),
    "qformer": Official(
        "google-bert/bert-base-uncased on the Hugging Face Hub (config.json, model.safetensors)",
        check_bert,
    ),
}
"""Kind of encoder or connector -> its weights."""
UNKNOWN = Official("whoever made that kind", check_any)
