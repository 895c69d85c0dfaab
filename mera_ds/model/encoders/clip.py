"""CLIP's image transformer for pictures and for frames of video, as LLaVA-1.5 uses ViT-L/14-336.

Features are the patch tokens of the second-last layer, without the final norm (Radford et al.
2021; Liu et al. 2024). The last layer is never built.
"""

import copy
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.activations import ACT2FN

from mera_ds.batch import Features
from mera_ds.config import Dtype
from mera_ds.errors import DataError, InputError
from mera_ds.files import read_json
from mera_ds.model.backbone import DTYPES
from mera_ds.model.encoders.base import Encoder, require_weights
from mera_ds.model.encoders.visual import even_indices
from mera_ds.model.official import below_prefix, load_exactly, read_official, require_exact

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
FILL = (122, 116, 104)
"""The mean as a colour: what is around a padded picture."""

LONGEST_SIDE = 8192
"""Larger pictures are shrunk to this first, so that no canvas takes gigabytes."""
LONGEST_RATIO = 16
"""A longer strip than this is cut to it before its short side is resized."""

FILES = ("model.safetensors", "pytorch_model.bin")
VIT_L_14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
ARCHITECTURE = (*VIT_L_14_336, "num_channels", "hidden_act", "layer_norm_eps")
"""What is read of a `config.json`."""

Aspect = Literal["pad", "square"]


@dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """Options of `clip-vit`."""

    aspect: Aspect = "pad"
    """How a picture becomes square. `pad`: on a canvas in the mean colour (LLaVA-1.5, stage 2);
    `square`: its centre is cut out (CLIP; LLaVA-1.5, stage 1)."""
    dtype: Dtype = "fp32"
    """Compute dtype."""


@dataclass(frozen=True, kw_only=True)
class ClipFramesOptions(ClipOptions):
    """Options of `clip-vit-frames`."""

    frames: int = 4
    """How many frames to take, evenly from the first to the last one."""
    pooling: int = 2
    """Side of the squares of patches that become one token; 1: every patch is a token."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("frames", "pooling"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")


def preprocess(image: Image.Image, size: int, aspect: Aspect) -> Tensor:
    """Turn an RGB image into CLIP's pixel values (3, size, size)."""
    square = {"pad": _padded, "square": _centre}[aspect](_bounded(image), size)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (pixels * (1 / 255) - mean) / std


def _bounded(image: Image.Image) -> Image.Image:
    if max(image.size) <= LONGEST_SIDE:
        return image
    return ImageOps.contain(image, (LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BICUBIC)


def _padded(image: Image.Image, size: int) -> Image.Image:
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), FILL)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas.resize((size, size), Image.Resampling.BICUBIC)


def _centre(image: Image.Image, size: int) -> Image.Image:
    short = min(image.size)
    image = _crop(image, *(min(side, LONGEST_RATIO * short) for side in image.size))
    width, height = (int(size * side / short) for side in image.size)
    return _crop(image.resize((width, height), Image.Resampling.BICUBIC), size, size)


def _crop(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def pool_patches(tokens: Tensor, pooling: int) -> Tensor:
    """Shrink square grids of tokens (B, G², D) to (B, ceil(G / pooling)², D), bilinearly.

    Where `pooling` is 2 and divides G this is the mean of each 2 x 2 square (LLaVA-NeXT).
    """
    grid = round(tokens.shape[1] ** 0.5)
    maps = tokens.transpose(1, 2).unflatten(2, (grid, grid))
    pooled = F.interpolate(maps, size=(-(-grid // pooling),) * 2, mode="bilinear")
    return pooled.flatten(2).transpose(1, 2)


def locate_clip(weights: Path, kind: str) -> tuple[Path, Any]:
    """Return the weight file of a Hugging Face folder (or a given one), and its `CLIPVisionConfig`.

    A file without a `config.json` beside it is taken for ViT-L/14-336.

    Raises:
        InputError: if there is no weight file, or `config.json` can't be read.
        DataError: if `config.json` describes no network that can be built.
    """
    folder = weights if weights.is_dir() else weights.parent
    path = weights
    if weights.is_dir():
        found = [folder / name for name in FILES if (folder / name).is_file()]
        if not found:
            raise InputError(f"encoder '{kind}': {folder} holds none of {', '.join(FILES)}")
        path = found[0]
    values: dict[str, Any] = VIT_L_14_336
    if (folder / "config.json").is_file():
        values = _architecture(folder / "config.json")
    try:
        return path, CLIPVisionConfig(**values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise DataError(f"{folder / 'config.json'} describes no CLIP network: {error}") from None


def _architecture(path: Path) -> dict[str, Any]:
    """Return what a `config.json` of a CLIP or of its image tower says of the tower."""
    content = read_json(path)
    if isinstance(content, Mapping):
        content = content.get("vision_config", content)
    if not isinstance(content, Mapping):
        raise DataError(f"{path} describes no CLIP network: it holds no settings")
    values = {name: content[name] for name in ARCHITECTURE if name in content}
    for name in VIT_L_14_336:
        least = 2 if name == "num_hidden_layers" else 1  # features are the second-last layer's
        value = values.get(name, least)
        if type(value) is not int or value < least:
            raise DataError(f"{path}: {name} is {value!r}; it must be at least {least}")
    if values.get("hidden_act", "quick_gelu") not in ACT2FN:
        raise DataError(f"{path}: hidden_act '{values['hidden_act']}' is unknown to transformers")
    return values


def load_clip(path: Path, config: Any, dtype: Dtype, kind: str) -> nn.Module:
    """Build the network but for its last layer, with the weights of a CLIP or of its image tower.

    Raises:
        DataError: if the file does not hold exactly this architecture's tensors.
    """
    state = below_prefix(read_official(path, f"encoder '{kind}'").tensors, ["vision_model."])
    state.pop("embeddings.position_ids", None)  # older files hold this buffer
    last = config.num_hidden_layers - 1
    shortened = copy.deepcopy(config)
    shortened.num_hidden_layers = last
    shortened._attn_implementation = _attention(dtype)
    with torch.device("meta"):
        require_exact(state, _tower(CLIPVisionModel(config)).state_dict(), path, kind)
        network: nn.Module = CLIPVisionModel(shortened)
    kept = {k: v for k, v in state.items() if not k.startswith(f"encoder.layers.{last}.")}
    tower = _tower(network)
    load_exactly(tower, kept, path, kind)
    positions = torch.arange(tower.embeddings.num_positions)
    tower.embeddings.position_ids = positions.expand(1, -1)
    return network.to(DTYPES[dtype])


def _tower(network: nn.Module) -> Any:
    """Return the module whose names are those of the files: transformers 5.0 wraps it."""
    return getattr(network, "vision_model", network)


def _attention(dtype: Dtype) -> str:
    half = dtype != "fp32" and torch.cuda.is_available()
    return "flash_attention_2" if half and importlib.util.find_spec("flash_attn") else "sdpa"


class ClipNetworkEncoder(Encoder):
    """What the kinds have in common that show pictures to a CLIP."""

    def __init__(self, kind: str, options: Any, weights: Path | None) -> None:
        super().__init__(kind, options, weights)
        given = require_weights(weights, kind, "a CLIP folder or a weight file in it")
        path, config = locate_clip(given, kind)
        self.size = int(config.image_size)
        self.feature_dim = config.hidden_size
        grid = -(-(self.size // config.patch_size) // self.pooling)
        self.max_tokens = self.pictures * grid**2
        self.network = load_clip(path, config, options.dtype, kind)
        self.freeze({name: getattr(config, name) for name in ARCHITECTURE})

    @property
    def pictures(self) -> int:
        """How many pictures make one medium; all tokens of all of them are real."""
        return 1

    @property
    def pooling(self) -> int:
        """Side of the squares of patches that become one token."""
        return 1

    @torch.no_grad()
    def forward(self, inputs: Sequence[Tensor]) -> Features:
        """Encode B media, each (pictures, 3, size, size); the tokens keep that order."""
        weight = next(self.network.parameters())
        pixels = torch.cat(list(inputs)).to(weight.device, weight.dtype)
        tokens = self.network(pixel_values=pixels).last_hidden_state[:, 1:].float()
        if self.pooling > 1:
            tokens = pool_patches(tokens, self.pooling)
        values = tokens.reshape(len(inputs), self.max_tokens, self.feature_dim)
        mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        return Features(values, mask)


class ClipEncoder(ClipNetworkEncoder):
    """Kind `clip-vit`: one image -> a token per patch, row by row (576 of width 1024)."""

    Options = ClipOptions
    media = "image"

    def transform(self, media: Image.Image) -> Tensor:
        """RGB image -> pixel values (1, 3, size, size)."""
        return preprocess(media, self.size, self.options.aspect)[None]


class ClipFramesEncoder(ClipNetworkEncoder):
    """Kind `clip-vit-frames`: a clip -> its frames' pooled tokens in order of time (4 x 144).

    The paper pools before the connector (Appendix B).
    """

    Options = ClipFramesOptions
    media = "video"

    @property
    def pictures(self) -> int:
        """Frames that are looked at."""
        return self.options.frames

    @property
    def pooling(self) -> int:
        """Side of the squares of patches that become one token."""
        return self.options.pooling

    def transform(self, media: NDArray[np.uint8]) -> Tensor:
        """RGB frames (F, H, W, 3) -> pixel values (frames, 3, size, size)."""
        pictures = (
            Image.fromarray(media[index]) for index in even_indices(len(media), self.pictures)
        )
        return torch.stack([preprocess(p, self.size, self.options.aspect) for p in pictures])
