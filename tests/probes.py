"""A probe of what a step computes and keeps: every operation's results, and which of them live."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operations(TorchDispatchMode):
    """Records every new tensor, forward and backward; weights and views of them don't count."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self._known = {StorageWeakRef(entry.untyped_storage()) for entry in weights}
        self._inside: list[int] = []
        self._made: dict[StorageWeakRef, tuple[int, int]] = {}
        self.shapes: set[tuple[int, ...]] = set()
        self.backward_shapes: set[tuple[int, ...]] = set()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it gives."""
        result = func(*args, **(kwargs or {}))
        self.calls[func.name().partition(".")[0]] += 1
        for entry in tree_leaves(result):
            if isinstance(entry, Tensor):
                self._look_at(entry)
        return result

    def _look_at(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference in self._known:
            return
        self.shapes.add(tuple(tensor.shape))
        if torch._C._current_autograd_node() is not None:
            self.backward_shapes.add(tuple(tensor.shape))
        place = self._inside[-1] if self._inside else -1
        self._made.setdefault(reference, (storage.nbytes(), place))

    @contextmanager
    def within(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Note in which of some modules a tensor is made."""
        hooks = []
        for number, module in enumerate(modules):
            hooks += [
                module.register_forward_pre_hook(lambda *_, n=number: self._inside.append(n)),
                module.register_forward_hook(lambda *_: (self._inside.pop(), None)[1]),
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def alive(self, module: int | None = None) -> int:
        """Return the bytes of the storages that still exist, of those made in one module or all."""
        return sum(
            size
            for reference, (size, place) in self._made.items()
            if module in (None, place) and not reference.expired()
        )

    def rows_of(self, width: int) -> int:
        """Return the largest number of rows among the tensors whose last dimension is `width`."""
        found = (torch.Size(shape[:-1]).numel() for shape in self.shapes if shape[-1:] == (width,))
        return max(found, default=0)
