"""The literal merge: the average of two HF checkpoint folders, tensor by tensor.

Both folders may be cut into shards in any way. Tensors are read one at a time from memory-mapped
safetensors, averaged in fp32 and rounded once to the dtype of the previous checkpoint; the output
is a complete HF folder. Resident memory is a few tensors plus one output shard, whatever the size
of the model.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mera_ds.checkpoint import write_safetensors
from mera_ds.errors import DataError, InputError
from mera_ds.files import (
    committed_folder,
    failpoint,
    read_json,
    require_space,
    sha256_file,
    write_json,
)

INDEX = "model.safetensors.index.json"
WEIGHTS = "*.safetensors"
RECORD = "merge.json"
"""What a merge writes about itself."""

_NOT_COPIED = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf")
"""Endings of files with weights: those of the previous checkpoint are not those of the merge."""


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor of a checkpoint is, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    size: int
    """Bytes."""


def tensor_places(folder: Path) -> dict[str, TensorPlace]:
    """Return every tensor of an HF checkpoint folder, from the files' headers alone.

    Raises:
        InputError: if the folder holds no safetensors.
        DataError: if a file can't be read, a tensor stands in two files, or the index disagrees.
    """
    files = sorted(folder.glob(WEIGHTS))
    if not (folder / "config.json").exists() or not files:
        raise InputError(f"{folder} holds no HF checkpoint (config.json and *.safetensors)")
    places: dict[str, TensorPlace] = {}
    for file in files:
        for name, place in _header(file).items():
            if name in places:
                raise DataError(
                    f"{folder}: '{name}' is in {places[name].file.name} and {file.name}"
                )
            places[name] = place
    if (folder / INDEX).exists():
        named = read_json(folder / INDEX)["weight_map"]
        if set(named) != set(places):
            odd = sorted(set(named) ^ set(places))[0]
            raise DataError(
                f"{folder / INDEX} and the files disagree on '{odd}'; restore the folder"
            )
    return places


def _header(file: Path) -> dict[str, TensorPlace]:
    try:
        with safe_open(str(file), framework="pt") as opened:
            places = {}
            for name in opened.keys():
                part = opened.get_slice(name)
                shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
                size = opened.get_tensor(name).element_size()
                for length in shape:
                    size *= length
                places[name] = TensorPlace(file, shape, dtype, size)
            return places
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} can't be read as safetensors ({error})") from None


def differences(previous: Path, tuned: Path, stage: int) -> list[str]:
    """Return everything that forbids averaging two checkpoints; empty if there is nothing."""
    old, new = tensor_places(previous), tensor_places(tuned)
    found = [f"'{name}' is only in {previous}" for name in sorted(old.keys() - new.keys())]
    found += [f"'{name}' is only in {tuned}" for name in sorted(new.keys() - old.keys())]
    found += [
        f"'{name}' is {old[name].shape} in {previous} and {new[name].shape} in {tuned}"
        for name in sorted(old.keys() & new.keys())
        if old[name].shape != new[name].shape
    ]
    for fact in ("model_type", "vocab_size", "tie_word_embeddings"):
        values = [read_json(folder / "config.json").get(fact) for folder in (previous, tuned)]
        if values[0] != values[1]:
            found.append(
                f"config.json: {fact} is {values[0]} in {previous} and {values[1]} in {tuned}"
            )
    return found + _out_of_order(previous, tuned, stage)


def _out_of_order(previous: Path, tuned: Path, stage: int) -> list[str]:
    """Return what the records of earlier merges say against this one."""
    found = []
    if (tuned / RECORD).exists():
        found.append(
            f"{tuned} is the result of a merge ({RECORD}), not a model that was tuned after one"
        )
    if (previous / RECORD).exists():
        merged = read_json(previous / RECORD).get("stage")
        if merged != stage - 1:
            found.append(
                f"{previous} is the merge of stage {merged} ({RECORD}), so the next is stage "
                f"{merged + 1}, not {stage}"
            )
    return found


def average(old: Tensor, new: Tensor, stage: int) -> Tensor:
    """Return (i−1)/i · old + 1/i · new in fp32, rounded once to `old`'s dtype.

    A tensor that did not change comes out bit-identical.
    """
    if torch.equal(old, new.to(old.dtype)):
        return old
    return torch.lerp(old.float(), new.float(), float(Fraction(1, stage))).to(old.dtype)


def merge_checkpoints(
    previous: Path, tuned: Path, stage: int, output: Path, shard_size: int = 2_000_000_000
) -> Path:
    """Write the cumulative moving average of two checkpoints as a complete HF folder.

    Args:
        previous: θ_{i−1}.
        tuned: θ_tuned, trained from it.
        stage: i, at least 1.
        output: the folder to write; must not exist.
        shard_size: most bytes per output file.

    Raises:
        InputError: if the checkpoints don't fit together or are not in order (all reasons are
            listed), the stage is not positive, or the output exists.
        DataError: if a file can't be read, or a merged tensor is not finite.
        ResourceError: if the disk is too small.
    """
    if stage < 1:
        raise InputError(f"--stage is {stage}; stages count from 1")
    if output.exists():
        raise InputError(f"{output} exists; delete it or choose another --out")
    found = differences(previous, tuned, stage)
    if found:
        raise InputError("the checkpoints can't be merged:\n  " + "\n  ".join(found))
    places = tensor_places(previous)
    require_space(output.parent, sum(place.size for place in places.values()) + 10_000_000)
    shards = _shards(places, shard_size)
    with committed_folder(output) as folder:
        weight_map = {}
        for number, names in enumerate(shards, start=1):
            file = (
                "model.safetensors"
                if len(shards) == 1
                else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            )
            merged = dict(_averages(names, places, tensor_places(tuned), stage))
            write_safetensors(folder / file, merged, metadata={"format": "pt"})
            failpoint("merge.after_file")
            weight_map.update(dict.fromkeys(names, file))
        _complete(folder, previous, tuned, stage, weight_map, places)
    return output


def _shards(places: Mapping[str, TensorPlace], shard_size: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(places):
        if shards[-1] and filled + places[name].size > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += places[name].size
    return shards


def _averages(
    names: list[str],
    old: Mapping[str, TensorPlace],
    new: Mapping[str, TensorPlace],
    stage: int,
) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        with (
            safe_open(str(old[name].file), framework="pt") as old_file,
            safe_open(str(new[name].file), framework="pt") as new_file,
        ):
            before = old_file.get_tensor(name)
            merged = average(before, new_file.get_tensor(name), stage)
        if merged is not before and not bool(torch.isfinite(merged).all()):
            raise DataError(
                f"the average of '{name}' is not finite; look at {old[name].file} and "
                f"{new[name].file}"
            )
        yield name, merged.contiguous()


def _complete(
    folder: Path,
    previous: Path,
    tuned: Path,
    stage: int,
    weight_map: Mapping[str, str],
    places: Mapping[str, TensorPlace],
) -> None:
    """Add configuration, tokenizer, index and provenance."""
    for source in sorted(previous.iterdir()):
        if source.is_file() and not source.name.endswith(_NOT_COPIED):
            shutil.copyfile(source, folder / source.name)
    if len(set(weight_map.values())) > 1:
        total = sum(place.size for place in places.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index)
    inputs = {
        name: {path.name: sha256_file(path) for path in sorted(source.glob(WEIGHTS))}
        for name, source in (("previous", previous), ("tuned", tuned))
    }
    facts = {"method": "cumulative moving average", "stage": stage, "inputs": inputs}
    write_json(folder / RECORD, facts)
