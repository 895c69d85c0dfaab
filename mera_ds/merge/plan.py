"""What a merge will write: every output tensor, and the files they go into."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mera_ds.files import sha256_json
from mera_ds.merge.adapter import LowRank, check_base, compare_adapter, is_adapter, read_adapter
from mera_ds.merge.compare import (
    Findings,
    check_order,
    check_parents,
    compare_base,
    compare_checkpoints,
)
from mera_ds.merge.rule import Rule, Weight
from mera_ds.merge.safetensors_io import (
    FLOATS,
    TensorPlace,
    header_bytes,
    item_size,
    tensor_places,
)


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the output and what it is made of."""

    name: str
    old: TensorPlace
    new: TensorPlace | LowRank | None
    """The tuned tensor, its update, or None if the old one is taken over."""
    dtype: str
    """Of the output, as safetensors names it."""
    weight: Weight
    """λ: what the update counts."""
    base: TensorPlace | None = None
    """The model before the first stage, for methods that need it."""

    @property
    def layer(self) -> str:
        """The name by which methods and their options know it."""
        return self.name.removesuffix(".weight")

    @property
    def size(self) -> int:
        """Bytes in the output."""
        return self.old.elements * item_size(self.dtype)


@dataclass(frozen=True)
class Shard:
    """One file of the output."""

    file: str
    tensors: tuple[MergedTensor, ...]
    """In the order in which they stand in the file."""

    @cached_property
    def header(self) -> bytes:
        """The file's first bytes."""
        return header_bytes((t.name, t.dtype, t.old.shape) for t in self.tensors)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(tensor.size for tensor in self.tensors)

    def places(self, folder: Path) -> dict[str, TensorPlace]:
        """Return where each tensor is in the file."""
        found, offset = {}, len(self.header)
        for tensor in self.tensors:
            found[tensor.name] = TensorPlace(
                folder / self.file, tensor.dtype, tensor.old.shape, offset
            )
            offset += tensor.size
        return found


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """A merge that may be carried out."""

    previous: Path
    tuned: Path
    rule: Rule
    dtype: str | None
    """The output's, if one was asked for; else each tensor keeps its own."""
    shards: tuple[Shard, ...]
    old: Mapping[str, TensorPlace]
    """All tensors of --previous."""
    new: Mapping[str, TensorPlace]
    """All tensors of --tuned."""
    base: Mapping[str, TensorPlace]
    """All tensors of --base that the method needs."""
    adapter: bool
    """Whether --tuned is an adapter."""
    notes: tuple[str, ...]

    @property
    def stage(self) -> int:
        """The number of the stage."""
        return self.rule.stage

    @property
    def coefficient(self) -> Weight | None:
        """What the tuned model counts, if it is one number."""
        found = {tensor.weight for tensor in self.tensors if tensor.old.dtype in FLOATS}
        return found.pop() if len(found) == 1 and self.rule.combine is None else None

    @property
    def output_bytes(self) -> int:
        """Bytes of weights to write."""
        return sum(shard.size for shard in self.shards)

    @property
    def input_bytes(self) -> int:
        """Bytes of weights to read."""
        return sum(place.size for places in self.inputs for place in places.values())

    @property
    def inputs(self) -> list[Mapping[str, TensorPlace]]:
        """The tensors of every model that is read."""
        return [self.old, self.new, *([self.base] if self.base else [])]

    @property
    def tensors(self) -> list[MergedTensor]:
        """All tensors of the output, in the order in which they are written."""
        return [tensor for shard in self.shards for tensor in shard.tensors]

    @cached_property
    def key(self) -> str:
        """Name of the inputs and settings; equal key, equal output.

        The inputs count by their files' names, sizes and times of change.
        """
        files = [_stamps(places) for places in self.inputs]
        layout = [[shard.file, shard.header.decode("latin1")] for shard in self.shards]
        updates = [
            [tensor.name, tensor.new.scale, tensor.new.transposed]
            for tensor in self.tensors
            if isinstance(tensor.new, LowRank)
        ]
        rule = [self.rule.name, dict(self.rule.options)]
        return sha256_json([self.stage, rule, files, layout, updates])


def _stamps(places: Mapping[str, TensorPlace]) -> list[list[str | int]]:
    files = sorted({place.file for place in places.values()})
    status = [(file.name, file.stat()) for file in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in status]


def plan_merge(
    previous: Path,
    tuned: Path,
    rule: Rule,
    *,
    shard_size: int,
    dtype: str | None,
    workers: int,
) -> MergePlan:
    """Compare two models and plan the files of their merge.

    Raises:
        InputError: if they can't be merged; the message lists everything.
        DataError: if a file can't be read.
    """
    found, stage = Findings(), rule.stage
    sources: dict[str, TensorPlace | LowRank]
    adapter = is_adapter(tuned)
    if adapter:
        old = all_old = tensor_places(previous)
        parts = read_adapter(tuned, previous, found)
        compare_adapter(parts, tuned, previous, old, found)
        check_base(tuned, previous, found)
        check_order(previous, stage, found)
        if rule.warning is not None:
            found.notes.append(rule.warning)
        sources, new = {**parts.full, **parts.low_rank}, dict(parts.places)
    else:
        pair = compare_checkpoints(previous, tuned, stage, dtype, found)
        old, new, all_old = pair.old, pair.new, tensor_places(previous)
        sources = dict(new)
    base = {} if rule.base is None else compare_base(rule.base, previous, old, found)
    found.require_none()
    check_parents(previous, all_old, new, workers).require_none()
    tensors = _tensors(old, sources, base, rule, dtype)
    return MergePlan(
        previous=previous,
        tuned=tuned,
        rule=rule,
        dtype=dtype,
        shards=_shards(tensors, shard_size),
        old=all_old,
        new=new,
        base=base,
        adapter=adapter,
        notes=tuple(found.notes),
    )


def _tensors(
    old: Mapping[str, TensorPlace],
    sources: Mapping[str, TensorPlace | LowRank],
    base: Mapping[str, TensorPlace],
    rule: Rule,
    dtype: str | None,
) -> list[MergedTensor]:
    """Return all tensors of the output in the order of their names."""
    floats = {name for name, place in old.items() if place.dtype in FLOATS}
    layers = {name: name.removesuffix(".weight") for name in sorted(floats)}
    weights = rule.weights(list(layers.values()))
    return [
        MergedTensor(
            name,
            place,
            sources.get(name) if name in floats else None,
            dtype if dtype is not None and name in floats else place.dtype,
            weights[layers[name]] if name in floats else 0.0,
            base.get(name),
        )
        for name, place in sorted(old.items())
    ]


def _shards(tensors: Sequence[MergedTensor], shard_size: int) -> tuple[Shard, ...]:
    groups: list[list[MergedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.size
    return tuple(
        Shard(_file_name(number, len(groups)), _aligned(group))
        for number, group in enumerate(groups, start=1)
    )


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _aligned(group: Sequence[MergedTensor]) -> tuple[MergedTensor, ...]:
    """Order a file's tensors so that each begins at a multiple of its element size."""
    return tuple(sorted(group, key=lambda tensor: (-item_size(tensor.dtype), tensor.name)))
