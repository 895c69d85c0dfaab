"""Reads the `.pt` tensors that Cap3D distributes; nothing else in the recipes reads pickles."""

import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mera_ds.media.errors import Unusable

MAX_TENSOR_BYTES = 64 << 20


def load_tensor(content: bytes) -> NDArray[Any]:
    """Return the one tensor of a `.pt` file as an array.

    Raises:
        Unusable: the file is damaged or too large, or holds anything but a tensor.
    """
    if len(content) > MAX_TENSOR_BYTES:
        raise Unusable(f"it has {len(content)} bytes, more than {MAX_TENSOR_BYTES}")
    try:
        value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises what its unpickler happens to meet
        cause = str(error).partition("\n")[0]
        raise Unusable(f"{type(error).__name__}: {cause}") from None
    if not isinstance(value, torch.Tensor):
        raise Unusable(f"it holds a {type(value).__name__}, not a tensor")
    if value.numel() * value.element_size() > MAX_TENSOR_BYTES:
        raise Unusable(f"its tensor has the shape {tuple(value.shape)}, which is too large")
    return np.asarray(value.detach().to(torch.float32).numpy())
