"""Weight files in the official layouts, of random numbers and any size.

The tables of names and shapes are those of the published files, written out here rather than taken
from the package's networks.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

BEATS_CFG: dict[str, Any] = {
    "input_patch_size": 16,
    "embed_dim": 512,
    "conv_bias": False,
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "deep_norm": True,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.05,
    "dropout_input": 0.1,
    "layer_wise_gradient_decay_ratio": 1.0,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "relative_position_embedding": True,
    "num_buckets": 320,
    "max_distance": 800,
    "gru_rel_pos": True,
}
"""`cfg` of BEATs iter3+ (AS2M)."""

SMALL_BEATS = BEATS_CFG | {
    "embed_dim": 24,
    "encoder_layers": 3,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_attention_heads": 4,
    "conv_pos": 8,
    "conv_pos_groups": 4,
    "num_buckets": 32,
    "max_distance": 40,
}
SMALL_POINT_BERT = {
    "trans_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "group_size": 6,
    "num_group": 12,
    "encoder_dims": 20,
    "npoints": 100,
}
CLIP_CONFIG: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
SMALL_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}


def both(name: str, weight: tuple[int, ...], bias: int | None = None) -> Shapes:
    """Return the weight and the bias of a layer."""
    return {f"{name}.weight": weight, f"{name}.bias": (weight[0] if bias is None else bias,)}


def beats_shapes(cfg: dict[str, Any]) -> Shapes:
    """Return what the official BEATs file holds."""
    width, inner, heads = (
        cfg["encoder_embed_dim"],
        cfg["encoder_ffn_embed_dim"],
        cfg["encoder_attention_heads"],
    )
    patch, embed, taps = cfg["input_patch_size"], cfg["embed_dim"], cfg["conv_pos"]
    shapes: Shapes = {"patch_embedding.weight": (embed, 1, patch, patch)}
    shapes |= both("layer_norm", (embed,)) | both("post_extract_proj", (width, embed))
    shapes |= {
        "encoder.pos_conv.0.bias": (width,),
        "encoder.pos_conv.0.weight_g": (1, 1, taps),
        "encoder.pos_conv.0.weight_v": (width, width // cfg["conv_pos_groups"], taps),
    }
    shapes |= both("encoder.layer_norm", (width,))
    for number in range(cfg["encoder_layers"]):
        layer = f"encoder.layers.{number}"
        for name in "qkv":
            shapes |= both(f"{layer}.self_attn.{name}_proj", (width, width))
        shapes |= both(f"{layer}.self_attn.out_proj", (width, width))
        if cfg["gru_rel_pos"]:
            shapes |= both(f"{layer}.self_attn.grep_linear", (8, width // heads))
            shapes[f"{layer}.self_attn.grep_a"] = (1, heads, 1, 1)
        if cfg["relative_position_embedding"]:
            table = (cfg["num_buckets"], heads)
            shapes[f"{layer}.self_attn.relative_attention_bias.weight"] = table
        shapes |= both(f"{layer}.self_attn_layer_norm", (width,))
        shapes |= both(f"{layer}.fc1", (inner, width)) | both(f"{layer}.fc2", (width, inner))
        shapes |= both(f"{layer}.final_layer_norm", (width,))
    return shapes


def point_bert_shapes(config: dict[str, Any]) -> Shapes:
    """Return what the official Point-BERT file holds below its prefix."""
    width, dims = config["trans_dim"], config["encoder_dims"]
    shapes: Shapes = {"cls_token": (1, 1, width), "cls_pos": (1, 1, width)}
    for name, layers in (
        ("first_conv", ((128, 6, 1), (256, 128, 1))),
        ("second_conv", ((512, 512, 1), (dims, 512, 1))),
    ):
        shapes |= both(f"encoder.{name}.0", layers[0]) | both(f"encoder.{name}.3", layers[1])
        norm = f"encoder.{name}.1"
        shapes |= both(norm, (layers[0][0],))
        shapes |= {f"{norm}.running_{what}": (layers[0][0],) for what in ("mean", "var")}
        shapes[f"{norm}.num_batches_tracked"] = ()
    shapes |= both("reduce_dim", (width, dims))
    shapes |= both("pos_embed.0", (128, 3)) | both("pos_embed.2", (width, 128))
    for number in range(config["depth"]):
        block = f"blocks.blocks.{number}"
        shapes |= both(f"{block}.norm1", (width,)) | both(f"{block}.norm2", (width,))
        shapes[f"{block}.attn.qkv.weight"] = (3 * width, width)
        shapes |= both(f"{block}.attn.proj", (width, width))
        shapes |= both(f"{block}.mlp.fc1", (4 * width, width))
        shapes |= both(f"{block}.mlp.fc2", (width, 4 * width))
    return shapes | both("norm", (width,))


def clip_shapes(config: dict[str, Any]) -> Shapes:
    """Return what the image tower of an official CLIP file holds, without its prefix."""
    width, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    positions = 1 + (config["image_size"] // patch) ** 2
    shapes: Shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": (positions, width),
    }
    shapes |= both("pre_layrnorm", (width,)) | both("post_layernorm", (width,))
    for number in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{number}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= both(f"{layer}.self_attn.{name}", (width, width))
        shapes |= both(f"{layer}.layer_norm1", (width,)) | both(f"{layer}.layer_norm2", (width,))
        shapes |= both(f"{layer}.mlp.fc1", (inner, width))
        shapes |= both(f"{layer}.mlp.fc2", (width, inner))
    return shapes


def random_state(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Return random tensors that keep the activations' size; shared tables are equal."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(100)
        elif "running_var" in name or "weight_g" in name or "grep_a" in name:
            state[name] = 1 + 0.3 * noise.abs()
        elif len(shape) == 1 and name.endswith(".weight"):
            state[name] = 1 + 0.2 * noise
        elif name.endswith("relative_attention_bias.weight"):
            first = name.replace(name.split(".")[2], "0", 1)
            state[name] = state.get(first, noise).clone()
        elif name.endswith(("bias", "running_mean", "class_embedding", "cls_token", "cls_pos")):
            state[name] = 0.3 * noise
        else:
            fan_in = noise[0].numel() if "embedding.weight" not in name or len(shape) > 2 else 4
            state[name] = noise / max(fan_in, 1) ** 0.5
    return state


def write_beats(path: Path, cfg: dict[str, Any] = SMALL_BEATS) -> dict[str, Tensor]:
    """Write an official BEATs file; return its state dict."""
    state = random_state(beats_shapes(cfg))
    torch.save({"cfg": cfg, "model": state}, path)
    return state


def write_point_bert(path: Path, config: dict[str, Any] = SMALL_POINT_BERT) -> dict[str, Tensor]:
    """Write an official Point-BERT file; return the network's state dict."""
    state = random_state(point_bert_shapes(config))
    wrapped = {f"module.point_encoder.{name}": tensor for name, tensor in state.items()}
    others = {"module.logit_scale": torch.ones(()), "module.pc_projection": torch.ones(3, 4)}
    torch.save({"state_dict": wrapped | others, "epoch": 200}, path)
    return state


def write_clip(folder: Path, config: dict[str, Any] = SMALL_CLIP) -> dict[str, Tensor]:
    """Write the Hugging Face folder of a whole CLIP; return the image tower's state dict."""
    folder.mkdir(exist_ok=True)
    state = random_state(clip_shapes(config))
    whole = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    whole |= {
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "text_model.final_layer_norm.weight": torch.ones(8),
        "logit_scale": torch.ones(()),
        "visual_projection.weight": torch.ones(8, 32),
        "text_projection.weight": torch.ones(8, 8),
    }
    save_file(whole, folder / "model.safetensors")
    content = {"model_type": "clip", "projection_dim": 8, "vision_config": config}
    (folder / "config.json").write_text(json.dumps(content))
    return state
