"""What makes merged weights a complete HF folder: configuration, index, model card and report."""

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mera_ds import __version__
from mera_ds.files import read_json, sha256_file, write_bytes, write_json
from mera_ds.manifest import MANIFEST
from mera_ds.merge.adapter import CONFIG as ADAPTER_CONFIG
from mera_ds.merge.compare import EXPORT_RECORD, OTHER_IDS, OTHER_TEXT, RECORD
from mera_ds.merge.digest import read_digests, weights_digest
from mera_ds.merge.partial import TensorRecord
from mera_ds.merge.plan import MergePlan
from mera_ds.merge.safetensors_io import DTYPE_NAMES, INDEX, TensorPlace
from mera_ds.merge.stream import Squares
from mera_ds.mergeconfig import CMA

METHOD = "cumulative moving average"
REPORT = "merge_report.json"
CARD = "README.md"

WEIGHT_ENDINGS = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf"),
    *(".msgpack", ".h5", ".ot", ".onnx", ".onnx_data", ".tflite"),
)
"""Of files with weights, in any format: they are not carried over to other weights."""
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Totals:
    """The report in three figures and a count."""

    tensors: int
    unchanged: int
    update: float
    """‖θ_i − θ_{i−1}‖."""
    weights: float
    """‖θ_i‖ of what was computed."""
    rounding: float
    """‖written − θ_i‖ / ‖θ_i‖."""

    def lines(self) -> list[str]:
        """Return the printed summary."""
        if self.unchanged == self.tensors:
            return [f"all {self.tensors} tensors are equal in both models"]
        of_update = _percent(self.rounding * self.weights, self.update)
        return [
            f"update {self.update:.4g}, {_percent(self.update, self.weights)} of the weights",
            f"rounding {_percent(self.rounding, 1.0)} of the weights, {of_update} of the update",
            f"{self.unchanged} of {self.tensors} tensors unchanged",
        ]


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2g} %" if whole else "0 %"


def totals(records: Mapping[str, TensorRecord]) -> Totals:
    """Sum up the tensors' records."""
    squares = Squares()
    for _, record in sorted(records.items()):
        squares.add(record.squares)
    return Totals(
        len(records),
        sum(not record.changed for record in records.values()),
        math.sqrt(squares.update),
        math.sqrt(squares.weights),
        _rounding(squares),
    )


def _rounding(squares: Squares) -> float:
    return math.sqrt(squares.rounding / squares.sampled) if squares.sampled else 0.0


def complete(
    folder: Path, plan: MergePlan, records: Mapping[str, TensorRecord], workers: int
) -> None:
    """Add to the merged weights everything that an HF folder needs, and where they come from."""
    for source in _carried_over(plan):
        shutil.copyfile(source, folder / source.name)
    if plan.dtype is not None:
        _set_dtype(folder / "config.json", plan.dtype)
    if len(plan.shards) > 1:
        weight_map = {t.name: shard.file for shard in plan.shards for t in shard.tensors}
        total = sum(tensor.size for tensor in plan.tensors)
        write_json(
            folder / INDEX,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
    write_json(folder / REPORT, _report(records))
    record = _record(plan, records, workers)
    write_bytes(folder / CARD, _card(plan, record, totals(records)).encode())
    write_json(folder / RECORD, record)


def _carried_over(plan: MergePlan) -> Iterator[Path]:
    """Yield the previous model's files, and the tuned one's tokenizer where it has none."""
    own = [path for path in sorted(plan.previous.iterdir()) if path.is_file()]
    names = {path.name for path in own}
    about_itself = files_about_origin(plan.previous) | {CARD}
    for path in own:
        if not path.name.endswith(WEIGHT_ENDINGS) and path.name not in about_itself:
            yield path
    for name in (*OTHER_IDS, *OTHER_TEXT, "generation_config.json"):
        if name not in names and (plan.tuned / name).exists() and not plan.adapter:
            yield plan.tuned / name


def files_about_origin(folder: Path) -> frozenset[str]:
    """Return the names of files that say where a folder's weights come from: a merge, an export."""
    found: frozenset[str] = frozenset()
    if (folder / RECORD).exists():
        found |= {RECORD, REPORT, CARD}
    if (folder / EXPORT_RECORD).exists():
        found |= {EXPORT_RECORD, MANIFEST}
    return found


def _set_dtype(path: Path, dtype: str) -> None:
    config = read_json(path)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    write_json(path, {**config, key: _TORCH_NAMES[dtype]})


def _report(records: Mapping[str, TensorRecord]) -> dict[str, Any]:
    """Return norms per tensor and in total; those of unchanged tensors are 0."""
    total = totals(records)
    return {
        "total": {
            "tensors": total.tensors,
            "unchanged": total.unchanged,
            "update_norm": _rounded(total.update),
            "weights_norm": _rounded(total.weights),
            "rounding_error": _rounded(total.rounding),
        },
        "tensors": {
            name: {
                "changed": record.changed,
                "update_norm": _rounded(math.sqrt(record.squares.update)),
                "weights_norm": _rounded(math.sqrt(record.squares.weights)),
                "rounding_error": _rounded(_rounding(record.squares)),
            }
            for name, record in sorted(records.items())
        },
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _record(plan: MergePlan, records: Mapping[str, TensorRecord], workers: int) -> dict[str, Any]:
    """Return what `merge.json` says: method, inputs and output with their fingerprints."""
    tuned: dict[str, Any] = {"folder": plan.tuned.resolve().name, "files": _sizes(plan.new)}
    if plan.adapter:
        tuned["weights"] = weights_digest(read_digests(plan.new, workers))
        tuned["adapter_config_sha256"] = sha256_file(plan.tuned / ADAPTER_CONFIG)
    else:
        tuned["weights"] = weights_digest({name: r.tuned for name, r in records.items()})
    inputs = {
        "previous": {
            "folder": plan.previous.resolve().name,
            "files": _sizes(plan.old),
            "weights": weights_digest({name: r.previous for name, r in records.items()}),
        },
        "tuned": tuned,
    }
    if plan.rule.base is not None:
        inputs["base"] = {
            "folder": plan.rule.base.resolve().name,
            "files": _sizes(plan.base),
            "weights": weights_digest(read_digests(plan.base, workers)),
        }
    return {
        **_method(plan),
        "stage": plan.stage,
        "dtype": _dtypes(plan),
        "inputs": inputs,
        "weights": weights_digest({name: record.merged for name, record in records.items()}),
        "tool": f"mera-ds {__version__}",
    }


def _method(plan: MergePlan) -> dict[str, Any]:
    """Return the method's name, its options if there are any, and λ if it is one number."""
    found: dict[str, Any] = {"method": METHOD if plan.rule.name == CMA else plan.rule.name}
    if plan.rule.options:
        found["options"] = dict(plan.rule.options)
    if plan.coefficient is not None:
        found["coefficient"] = str(plan.coefficient)
    return found


def _sizes(places: Mapping[str, TensorPlace]) -> dict[str, int]:
    files = sorted({place.file for place in places.values()})
    return {file.name: file.stat().st_size for file in files}


def _dtypes(plan: MergePlan) -> list[str]:
    names = {dtype: name for name, dtype in DTYPE_NAMES.items()}
    found = sorted({tensor.dtype for tensor in plan.tensors})
    return [names.get(dtype, dtype) for dtype in found]


def equation(plan: MergePlan) -> str:
    """Return what is computed, in one line."""
    if plan.coefficient is not None:
        return f"θ = {1 - plan.coefficient} · θ_previous + {plan.coefficient} · θ_tuned"
    if plan.rule.base is None:
        return "θ = θ_previous + λ · (θ_tuned − θ_previous), λ by layer"
    return (
        f"θ = θ_base + {plan.rule.name} of θ_previous − θ_base and θ_tuned − θ_previous, "
        f"θ_base being {plan.rule.base.resolve().name}"
    )


def _card(plan: MergePlan, record: Mapping[str, Any], total: Totals) -> str:
    """Return the model card."""
    previous, tuned = record["inputs"]["previous"], record["inputs"]["tuned"]
    kind = "LoRA adapter" if plan.adapter else "checkpoint"
    bullets = "\n".join(f"- {line}" for line in total.lines())
    return f"""---
tags:
- merge
- mera-ds
---
# {previous["folder"]} and {tuned["folder"]}, merged

{equation(plan)} ({record["method"]}, stage {plan.stage}; "Merge then Realign", arXiv 2503.07663).

| | {kind if plan.adapter else "folder"} | fingerprint of the weights |
|---|---|---|
| previous | {previous["folder"]} | `{previous["weights"]}` |
| tuned ({kind}) | {tuned["folder"]} | `{tuned["weights"]}` |
| this model | | `{record["weights"]}` |

{bullets}

Written in {", ".join(record["dtype"])} by {record["tool"]}. `{RECORD}` holds these facts for \
programs, `{REPORT}` the norms of every tensor. Configuration and tokenizer are those of the \
previous model.
"""
