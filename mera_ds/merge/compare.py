"""Everything that speaks against merging two models, found before a byte is written."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mera_ds.errors import InputError
from mera_ds.files import read_json
from mera_ds.merge.digest import read_digests, weights_digest
from mera_ds.merge.safetensors_io import (
    DTYPE_NAMES,
    FLOATS,
    MappedFiles,
    TensorPlace,
    tensor_places,
)

RECORD = "merge.json"
"""What a merge writes about itself."""

EXPORT_RECORD = "export.json"
"""What an export of a lineage does."""

OTHER_IDS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
OTHER_TEXT = (
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Tokenizer files: those that decide which ids a text has, and the rest."""

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
"""How the names of the two tensors end that may be tied."""

_SHOWN = 10
_ABOUT_THE_FILES = frozenset(
    ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_commit_hash")
)
_ABOUT_GENERATION = frozenset(("bos_token_id", "eos_token_id", "pad_token_id"))
_NOT_ABOUT_IDS = frozenset(("version", "truncation", "padding"))
"""Of tokenizer.json: a tokenizer that cut or padded a batch saves how, with the same vocabulary."""


@dataclass
class Findings:
    """What was found: differences forbid the merge, notes don't."""

    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, lines: Iterable[str], remedy: str) -> None:
        """Add differences of one kind, the first ten of them, and what to do about them."""
        found = list(lines)
        if not found:
            return
        self.differences += found[:_SHOWN]
        if len(found) > _SHOWN:
            self.differences.append(f"… and {len(found) - _SHOWN} more like this")
        self.differences.append(f"→ {remedy}")

    def require_none(self) -> None:
        """Raise an `InputError` with all differences, if there is one."""
        if self.differences:
            text = "\n  ".join(self.differences)
            raise InputError(f"the checkpoints can't be merged:\n  {text}")


@dataclass(frozen=True)
class Pair:
    """Two checkpoints and their tensors, as far as both have them."""

    previous: Path
    tuned: Path
    old: dict[str, TensorPlace]
    new: dict[str, TensorPlace]


def compare_checkpoints(
    previous: Path, tuned: Path, stage: int, dtype: str | None, found: Findings
) -> Pair:
    """Compare two HF checkpoint folders; add to `found` what differs.

    Args:
        previous: θ_{i−1}.
        tuned: θ_tuned.
        stage: i.
        dtype: the output's, as safetensors names it, if one was asked for.
        found: gets the differences and notes.

    Returns:
        The tensors; an output head that only repeats tied embeddings is left out.

    Raises:
        InputError, DataError: if a folder can't be read at all.
    """
    pair = Pair(previous, tuned, tensor_places(previous), tensor_places(tuned))
    configs = [read_config(folder) for folder in (previous, tuned)]
    _without_tied_heads(pair, configs, found)
    _compare_keys(pair, found)
    both = sorted(pair.old.keys() & pair.new.keys())
    _compare_shapes(pair, both, found)
    _compare_dtypes(pair, both, dtype, found)
    _compare_configs(pair, configs, found)
    _compare_tokenizers(pair, found)
    check_order(previous, stage, found)
    if (tuned / RECORD).exists():
        found.add(
            [f"{tuned} is the result of a merge ({RECORD}), not a model tuned after one"],
            "--tuned is the model that was trained from --previous",
        )
    return pair


def compare_base(
    base: Path, previous: Path, old: Mapping[str, TensorPlace], found: Findings
) -> dict[str, TensorPlace]:
    """Return the tensors of the model before the first stage; add to `found` what does not fit."""
    places = tensor_places(base)
    wanted = {name: place for name, place in old.items() if _is_float(place)}
    lines = [f"'{name}' is only in {previous}, not in {base}" for name in wanted.keys() - places]
    both = sorted(wanted.keys() & places)
    lines += [
        f"'{name}' is {places[name].dtype} {places[name].shape} in {base} and "
        f"{wanted[name].dtype} {wanted[name].shape} in {previous}"
        for name in both
        if places[name].shape != wanted[name].shape or not _is_float(places[name])
    ]
    found.add(sorted(lines), "--base is the model that the first stage was trained from")
    return {name: places[name] for name in both}


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Return a checkpoint's configuration."""
    config = read_json(folder / name)
    if not isinstance(config, dict):
        raise InputError(f"{folder / name} holds no configuration; restore it")
    return config


def _without_tied_heads(pair: Pair, configs: list[dict[str, Any]], found: Findings) -> None:
    """Leave out an output head that only one of two tied checkpoints stores."""
    for places, other, config, folder in (
        (pair.old, pair.new, configs[0], pair.previous),
        (pair.new, pair.old, configs[1], pair.tuned),
    ):
        for head in [name for name in places.keys() - other.keys() if name.endswith(HEADS)]:
            embeddings = [name for name in places if name.endswith(EMBEDDINGS)]
            tied = config.get("tie_word_embeddings")  # absent: what the architecture's default is
            if tied is False or len(embeddings) != 1:
                continue
            files = MappedFiles(places[name].file for name in (head, embeddings[0]))
            if np.array_equal(files.raw(places[head]), files.raw(places[embeddings[0]])):
                del places[head]
                found.notes.append(
                    f"'{head}' of {folder} repeats its tied embeddings; it is left out"
                )
            elif tied:
                found.add(
                    [f"'{head}' of {folder} differs from the embeddings it is tied to"],
                    "set tie_word_embeddings to false in its config.json and store the head in "
                    "the other checkpoint, too, or remove the tensor",
                )


def _compare_keys(pair: Pair, found: Findings) -> None:
    only_old = sorted(pair.old.keys() - pair.new.keys())
    only_new = sorted(pair.new.keys() - pair.old.keys())
    remedy = "both must be the same architecture, saved the same way; nothing is left out or added"
    heads = [name for name in (*only_old, *only_new) if name.endswith(HEADS)]
    if heads:
        remedy = (
            f"'{heads[0]}' is stored where embeddings are not tied: save both with the same "
            "tie_word_embeddings"
        )
    found.add(
        [f"'{name}' is only in {pair.previous}" for name in only_old]
        + [f"'{name}' is only in {pair.tuned}" for name in only_new],
        remedy,
    )


def _compare_shapes(pair: Pair, both: list[str], found: Findings) -> None:
    different = [name for name in both if pair.old[name].shape != pair.new[name].shape]
    remedy = "give the model that was trained from --previous; nothing is cut or padded"
    if any(name.endswith((*EMBEDDINGS, *HEADS)) for name in different):
        remedy = (
            "the vocabularies differ in size: resize the embeddings of --previous as it was done "
            "before training (model.resize_token_embeddings) and save it; nothing is cut or padded"
        )
    found.add(
        [
            f"'{name}' is {pair.old[name].shape} in {pair.previous} and "
            f"{pair.new[name].shape} in {pair.tuned}"
            for name in different
        ],
        remedy,
    )


def _compare_dtypes(pair: Pair, both: list[str], dtype: str | None, found: Findings) -> None:
    other = [name for name in both if pair.old[name].dtype != pair.new[name].dtype]
    floats = [name for name in other if _is_float(pair.old[name]) and _is_float(pair.new[name])]
    if dtype is None and floats:
        found.add(
            [
                f"'{name}' is {pair.old[name].dtype} in {pair.previous} and "
                f"{pair.new[name].dtype} in {pair.tuned}"
                for name in floats
            ],
            f"say what to write: --dtype {_named(pair.old[floats[0]])} or "
            f"--dtype {_named(pair.new[floats[0]])}",
        )
    fixed = [name for name in both if not (_is_float(pair.old[name]) and _is_float(pair.new[name]))]
    files = MappedFiles(place[name].file for place in (pair.old, pair.new) for name in fixed)
    found.add(
        [
            f"'{name}' is {pair.old[name].dtype} in {pair.previous}, "
            f"{pair.new[name].dtype} in {pair.tuned}, and not equal"
            for name in fixed
            if name in other
            or not np.array_equal(files.raw(pair.old[name]), files.raw(pair.new[name]))
        ],
        f"only {', '.join(FLOATS)} can be averaged: dequantise both checkpoints, and restore "
        "tables of integers from --previous",
    )


def _named(place: TensorPlace) -> str:
    return next(name for name, dtype in DTYPE_NAMES.items() if dtype == place.dtype)


def _is_float(place: TensorPlace) -> bool:
    return place.dtype in FLOATS


def _compare_configs(pair: Pair, configs: list[dict[str, Any]], found: Findings) -> None:
    old, new = configs
    different = []
    for key in sorted((old.keys() | new.keys()) - _ABOUT_THE_FILES):
        if old.get(key) == new.get(key):
            continue
        line = (
            f"config.json: {key} is {old.get(key, 'absent')} in {pair.previous} and "
            f"{new.get(key, 'absent')} in {pair.tuned}"
        )
        if key in old and key in new and key not in _ABOUT_GENERATION:
            different.append(line)
        else:
            found.notes.append(f"{line}; the output takes that of {pair.previous}")
    found.add(different, "correct the config.json that is wrong, or give models of one family")


def _compare_tokenizers(pair: Pair, found: Findings) -> None:
    different = []
    for name in (*OTHER_IDS, *OTHER_TEXT):
        old, new = pair.previous / name, pair.tuned / name
        if not (old.exists() and new.exists()) or _content(old) == _content(new):
            continue
        if name in OTHER_IDS:
            different.append(f"{name} differs: the same text has other token ids in the two models")
        else:
            found.notes.append(f"{name} differs; the output takes that of {pair.previous}")
    found.add(
        different,
        f"if {pair.tuned} was trained with the tokenizer of {pair.previous}, copy the file over "
        "its own; otherwise the two can't be merged",
    )


def _content(path: Path) -> Any:
    """Return what a file says, whatever the layout of its JSON."""
    content = path.read_bytes()
    if path.suffix != ".json":
        return content
    try:
        found = json.loads(content)
    except ValueError:
        return content
    return _about_ids(found) if path.name == OTHER_IDS[0] else found


def _about_ids(content: Any) -> Any:
    """Return what of a tokenizer.json decides about ids, merges in the newer of two spellings."""
    if not isinstance(content, dict):
        return content
    found = {key: value for key, value in content.items() if key not in _NOT_ABOUT_IDS}
    model = found.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        found["model"] = {**model, "merges": merges}
    return found


def _read_record(folder: Path) -> dict[str, Any]:
    """Return what the merge that wrote a folder says about itself; nothing if none did."""
    path = folder / RECORD
    if not path.exists():
        return {}
    record = read_json(path)
    try:
        int(record["stage"])
        if "weights" in record:
            str(record["inputs"]["tuned"]["weights"])
    except (TypeError, ValueError, KeyError):
        raise InputError(
            f"{path} is no record of a merge; restore it, or remove it if mera-ds didn't write it"
        ) from None
    return dict(record)


def check_order(previous: Path, stage: int, found: Findings) -> None:
    """Add what the record of the previous merge says against this one."""
    record = _read_record(previous)
    if not record:
        return
    merged = record["stage"]
    if merged != stage - 1:
        found.add(
            [
                f"{previous} is the merge of stage {merged} ({RECORD}), so the next is stage "
                f"{merged + 1}, not {stage}"
            ],
            f"use --stage {merged + 1}, or give the merge of stage {stage - 1} as --previous",
        )


def check_parents(
    previous: Path, old: Mapping[str, TensorPlace], new: Mapping[str, TensorPlace], workers: int
) -> Findings:
    """Compare the weights with those that the record of the previous merge names.

    It reads both models once; without a record, nothing.
    """
    found = Findings()
    record = _read_record(previous)
    if "weights" not in record:
        return found
    if weights_digest(read_digests(old, workers)) != record["weights"]:
        found.add(
            [f"{previous} does not hold the weights that its {RECORD} names"],
            "restore the folder, or merge it again",
        )
    if weights_digest(read_digests(new, workers)) == record["inputs"]["tuned"]["weights"]:
        found.add(
            [f"the tuned model went into {previous} already, as stage {record['stage']}"],
            f"give the model that was trained from {previous}",
        )
    return found
