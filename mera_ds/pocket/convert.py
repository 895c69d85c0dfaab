"""Convert the packages' weight files to safetensors. No pickle is executed.

The two `.pth` files are read with torch's restricted unpickler, which builds tensors and plain
containers only.
"""

import io
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mera_ds.pocket.packages import AISFX, EFFICIENTNET_LITE0, MINILM, SMOLLM2
from mera_ds.pocket.store import WEIGHTS

Converter = Callable[[Sequence[Path], Path], None]


def convert_smollm2(members: Sequence[Path], out: Path) -> None:
    """Dequantise a gguf file into a Hugging Face folder with float16 safetensors.

    A 4-bit weight is one of 16 values per block; float16 keeps it to 2e-4 (bfloat16: 1.4e-3).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (gguf,) = members
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        )
        # The loader still calls the dequantised model quantised, and would refuse to save it.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.to(torch.float16).save_pretrained(out)
        tokenizer.save_pretrained(out)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep progress bars and notices of the conversion off the terminal."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)


def convert_efficientnet_lite0(members: Sequence[Path], out: Path) -> None:
    """Write the feature extractor: names without their leading underscores, no classifier."""
    state = torch.load(members[0], map_location="cpu", weights_only=True)
    _save({re.sub(r"(^|\.)_", r"\1", k): v for k, v in state.items() if "_fc." not in k}, out)


class _Discarded:
    """Stands for a numpy scalar of the checkpoint: its pickled arguments are dropped."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def convert_aisfx(members: Sequence[Path], out: Path) -> None:
    """Write the embedding network of the checkpoint; its classifiers are left out.

    The checkpoint is (state dict, data set table), and the table holds numpy scalars: the
    unpickler gets `_Discarded` for them, so no numpy code runs.
    """
    harmless: list[Any] = [
        (_Discarded, "numpy.core.multiarray.scalar"),
        (_Discarded, "numpy.dtype"),
    ]
    with torch.serialization.safe_globals(harmless):
        state, _ = torch.load(members[0], map_location="cpu", weights_only=True)
    prefix = "embedding_net."
    _save({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, out)


def _save(state: dict[str, Tensor], out: Path) -> None:
    save_file({k: v.contiguous() for k, v in state.items()}, out / WEIGHTS, {"format": "pt"})


def convert_minilm(members: Sequence[Path], out: Path) -> None:
    """Move the BERT checkpoint, which is in safetensors already."""
    for member in members:
        shutil.move(member, out / member.name)


CONVERTERS: dict[str, Converter] = {
    SMOLLM2.component: convert_smollm2,
    EFFICIENTNET_LITE0.component: convert_efficientnet_lite0,
    AISFX.component: convert_aisfx,
    MINILM.component: convert_minilm,
}
