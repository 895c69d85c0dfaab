"""Checks of the backbone's folder: configuration, tokenizer, and each weight file by its header."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mera_ds.config import PromptConfig
from mera_ds.doctor.files import Shapes, indexed_files, read_object, read_shapes, size_text
from mera_ds.doctor.findings import Finding, look
from mera_ds.errors import DataError, InputError

SOURCES = {
    "meta-llama-3-8b-instruct": (
        "meta-llama/Meta-Llama-3-8B-Instruct on the Hugging Face Hub (accept its licence there)"
    )
}
"""Name of a backbone's folder, in lower case -> where it comes from."""
EXPECTED: Mapping[str, Mapping[str, Any]] = {
    "meta-llama-3-8b-instruct": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
}
"""What the `config.json` of a folder of that name must say."""
CONTENTS = (
    "no such folder; it must hold config.json, tokenizer.json, tokenizer_config.json, "
    "generation_config.json, model.safetensors.index.json and the files model-….safetensors that "
    "the index names (or model.safetensors alone)"
)
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
TEMPLATES = ("chat_template.jinja", "chat_template.json")


def examine_backbone(folder: Path, source: str | None, prompt: PromptConfig) -> list[Finding]:
    """Check a backbone's HF folder.

    Args:
        folder: where it should be.
        source: how it is made; None: by its name.
        prompt: tells whether a chat template is needed.
    """
    name = folder.name.lower()
    where = source or SOURCES.get(name, "the model's page on the Hugging Face Hub")
    if not folder.is_dir():
        return [
            Finding(what="backbone", path=folder, state="missing", detail=CONTENTS, source=where)
        ]
    findings = [
        look("backbone: configuration", folder, where, partial(_config, name=name)),
        look("backbone: tokenizer", folder, where, partial(_tokenizer, style=prompt.style)),
    ]
    try:
        files = indexed_files(folder)
    except (InputError, DataError):
        return [*findings, look("backbone: weights", folder, where, _list_weights)]
    shapes: dict[str, tuple[int, ...]] = {}
    for file, tensors in files.items():
        check = partial(_shard, tensors=tensors, shapes=shapes)
        findings.append(look(f"backbone: {file}", folder / file, where, check))
    if all(finding.fine for finding in findings):
        findings.append(look("backbone: tensors", folder, where, partial(_fit, shapes=shapes)))
    return findings


def _config(folder: Path, name: str) -> str:
    config = read_object(folder / "config.json")
    architectures = config.get("architectures")
    model = architectures[0] if isinstance(architectures, list) and architectures else None
    if not str(model).endswith("ForCausalLM"):
        raise DataError(f"config.json describes {model}, expected a …ForCausalLM")
    for key, value in EXPECTED.get(name, {}).items():
        if config.get(key) != value:
            raise DataError(f"config.json: {key} is {config.get(key)!r}, expected {value!r}")
    return (
        f"{model}, {config.get('num_hidden_layers')} layers of width {config.get('hidden_size')}, "
        f"vocabulary of {config.get('vocab_size')}"
    )


def _tokenizer(folder: Path, style: str) -> str:
    files = [name for name in TOKENIZERS if (folder / name).is_file()]
    if not files:
        raise InputError(f"it holds none of {', '.join(TOKENIZERS)}")
    if files[0].endswith(".json"):
        read_object(folder / files[0])
    template = [name for name in TEMPLATES if (folder / name).is_file()]
    settings = read_object(folder / "tokenizer_config.json")
    if "chat_template" in settings:
        template.append("tokenizer_config.json")
    if style == "chat" and not template:
        raise InputError(
            "it holds no chat template, which prompt.style=chat needs; take the model's Instruct "
            "variant or set prompt.style=plain"
        )
    return files[0] + (f", chat template in {template[0]}" if template else "")


def _list_weights(folder: Path) -> str:
    return f"{len(indexed_files(folder))} files"


def _shard(path: Path, tensors: set[str], shapes: dict[str, tuple[int, ...]]) -> str:
    found = read_shapes(path)
    missing = sorted(tensors - found.keys())
    if missing:
        raise DataError(f"it has no tensor '{missing[0]}', which the index puts there")
    shapes.update(found)
    return f"{size_text(path.stat().st_size)}, {len(found)} tensors"


def _fit(folder: Path, shapes: Shapes) -> str:
    """Compare embedding and number of layers with the configuration."""
    config = read_object(folder / "config.json")
    embedding = [shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")]
    wanted = (config.get("vocab_size"), config.get("hidden_size"))
    if embedding and embedding[0] != wanted:
        raise DataError(f"the embedding has shape {embedding[0]}, config.json says {wanted}")
    numbers = {match[1] for name in shapes if (match := re.search(r"\.layers\.(\d+)\.", name))}
    layers = config.get("num_hidden_layers")
    if numbers and len(numbers) != layers:
        raise DataError(f"the files hold {len(numbers)} layers, config.json says {layers}")
    return f"{len(shapes)} tensors fit the configuration"
