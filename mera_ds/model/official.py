"""Reading the weight files that others publish: safetensors, and torch's own `.pt` and `.bin`.

This is the one module of the model that reads torch's format: with the restricted unpickler, which
builds tensors and plain containers only. What official files hold besides (a training script's
arguments, numpy scalars) is dropped unread.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mera_ds.errors import DataError, InputError

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
"""Files of `torch.save`; every other name is read as safetensors."""

NESTED = ("state_dict", "model")
"""Where a file keeps its tensors if not at its top."""

_serialization: Any = torch.serialization

_BROKEN = (
    _serialization.pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)
"""What torch's reader raises on damaged files and on what it won't build."""


@dataclass(frozen=True)
class OfficialFile:
    """A weight file's content."""

    tensors: dict[str, Tensor]
    """The state dict."""
    rest: Mapping[str, Any]
    """What stands beside it: BEATs' `cfg`, or a safetensors file's metadata (texts)."""


class _Discarded:
    """Stands for an object that is not wanted: what it was pickled with is dropped."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_DISCARDED: list[Any] = [
    (_Discarded, name)
    for name in (
        "argparse.Namespace",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
    )
]


def read_official(path: Path, owner: str) -> OfficialFile:
    """Read a weight file; no code in it runs.

    Args:
        path: a safetensors file or one of `torch.save`, by its suffix.
        owner: what messages call the network, e.g. `encoder 'beats'`.

    Raises:
        InputError: if the file does not exist.
        DataError: if it can't be read, or holds no state dict.
    """
    if not path.is_file():
        raise InputError(f"{owner}: weights {path} do not exist")
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return OfficialFile(tensors, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a readable safetensors file: {error}") from None


def _read_torch(path: Path) -> OfficialFile:
    try:
        with torch.serialization.safe_globals(_DISCARDED):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _BROKEN as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path} is no file of torch.save with tensors and plain containers alone: {cause}"
        ) from None
    if not isinstance(content, Mapping):
        raise DataError(f"{path} holds a {type(content).__name__}, not a state dict")
    name = next((name for name in NESTED if isinstance(content.get(name), Mapping)), None)
    state = content if name is None else content[name]
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    rest = {key: value for key, value in content.items() if key not in tensors and key != name}
    if not tensors:
        raise DataError(f"{path} holds no tensors")
    return OfficialFile(tensors, rest)


def below_prefix(tensors: Mapping[str, Tensor], prefixes: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors below the first prefix that occurs, without it; else all of them."""
    for prefix in prefixes:
        found = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        if found:
            return found
    return dict(tensors)


def require_exact(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path, kind: str
) -> None:
    """Check a file's tensors against a network's own, by name, shape and finiteness.

    Raises:
        DataError: naming the first tensor that is missing, unknown, of another shape or not finite.
    """
    for name in sorted(own.keys() | state.keys()):
        if name not in state:
            raise DataError(f"{path} has no tensor '{name}'; is it a file for '{kind}'?")
        if name not in own:
            raise DataError(f"{path} holds '{name}', which '{kind}' does not know")
        if own[name].shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            raise DataError(f"{path}: '{name}' has shape {shapes}")
        if not torch.isfinite(state[name]).all():
            raise DataError(f"{path}: '{name}' holds values that are not finite")


def load_exactly(network: nn.Module, state: Mapping[str, Tensor], path: Path, kind: str) -> None:
    """Load a state dict that must have the network's own names and shapes.

    A network on the meta device gets its memory here, so it is never drawn at random first. Values
    are converted to the network's dtype.

    Raises:
        DataError: as `require_exact`.
    """
    own = network.state_dict()
    require_exact(state, own, path, kind)
    if any(tensor.is_meta for tensor in own.values()):
        network.to_empty(device="cpu")
    network.load_state_dict(state)
