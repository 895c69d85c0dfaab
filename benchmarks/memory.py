"""The estimate of training memory that `mera-ds plan` prints, beside what training takes.

`python benchmarks/memory.py` trains Llamas of width 512 (the 8B model's proportions) for two steps
each on a CPU, every case in a process of its own, and writes `benchmarks/results/memory.{json,md}`.
Measured is the peak of resident memory, with glibc told to give freed memory back at once
(MALLOC_MMAP_THRESHOLD_): what it keeps otherwise depends on the order of allocations.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from synthetic import LLAMA_3_8B, Rows, build, make_batch, make_engine, train, trained_sets

from mera_ds.config import load_profile
from mera_ds.distributed import ensure_launcher_variables, process_group
from mera_ds.estimate.memory import Training, total, training_memory
from mera_ds.estimate.shape import shape_of
from mera_ds.machine import commit

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
RANK = 128


@dataclass(frozen=True)
class Case:
    """A training step to measure."""

    phase: str = "tune"
    width: int = 512
    layers: int = 8
    vocabulary: int = 4096
    rows: int = 4
    media: int = 144
    labels: int = 16
    dropout: float = 0.05
    recompute: bool = True
    zero: int = 1

    @property
    def shape(self) -> dict[str, Any]:
        """Settings of its Llama."""
        return {
            **LLAMA_3_8B,
            "hidden_size": self.width,
            "intermediate_size": 7 * self.width // 2,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.width // 64,
            "num_key_value_heads": self.width // 256 or 1,
            "vocab_size": self.vocabulary,
        }

    @property
    def batch(self) -> Rows:
        """Its rows."""
        return Rows(self.rows, self.media, 48, self.labels)


CASES = (
    Case(),
    Case(recompute=False),
    Case(recompute=False, dropout=0.0),
    Case(rows=2, media=336, layers=4),
    Case(phase="align"),
    Case(phase="align", recompute=False, rows=2),
    Case(rows=2, zero=0),
    Case(rows=2, vocabulary=128256),
    Case(rows=4, media=48, labels=64, layers=2, vocabulary=128256),
    Case(width=768, layers=4, rows=2),
)
SMALLEST = Case(width=256, layers=2, rows=2)
"""What a test measures."""


def measure(case: Case) -> int:
    """Return the peak of resident memory of this process while it trains, in bytes."""
    overrides = [
        *(f"lora.rank={RANK}", f"lora.dropout={case.dropout}", f"execution.zero={case.zero}"),
        f"backbone.gradient_checkpointing={str(case.recompute).lower()}",
        "prompt.max_length=4096",
    ]
    config = load_profile("tiny", overrides)
    world = ensure_launcher_variables()
    with process_group(world, 600):
        model = build(config, case.shape, {}, ["image"], "cpu", lora=case.phase == "tune")
        engine = make_engine(config, model, case.phase, world)
        width = model.encoders["image"].feature_dim
        media = [torch.randn(case.media, width) for _ in range(case.rows)]
        batch = make_batch("image", media, case.batch, case.vocabulary, encoded=True)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        train(engine, dict.fromkeys(trained_sets(model, case.phase), 1e-5), [batch], 2, "cpu")
        status = Path("/proc/self/status").read_text()
        engine.close()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def predict(case: Case) -> float:
    """Return the estimate, in bytes."""
    training = Training(
        shape=shape_of(case.shape),
        dtype="fp32",
        lora_rank=RANK if case.phase == "tune" else 0,
        dropout=case.dropout,
        recompute=case.recompute,
        rows=case.rows,
        length=case.batch.length,
        labels=case.rows * case.labels,
        connectors=0,
        encoders=0.0,
        zero=case.zero,
    )
    return total(training_memory(training, "cpu"))


def in_process(case: Case) -> int:
    """Measure in a fresh process."""
    command = [sys.executable, __file__, "--measure", json.dumps(asdict(case))]
    variables = {**os.environ, **GIVE_BACK}
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
    return int(ended.stdout.splitlines()[-1])


def table(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [f"{result['machine']}, commit {result['commit']}, fp32, LoRA of rank {RANK}", ""]
    lines.append(
        "| phase | width × layers | vocabulary | tokens | labels | recomputed | dropout | ZeRO |"
        " estimated GB | measured GB | error |"
    )
    lines.append("|---" * 11 + "|")
    for row in result["rows"]:
        case = Case(**row["case"])
        lines.append(
            f"| {case.phase} | {case.width} × {case.layers} | {case.vocabulary} | "
            f"{case.rows} × {case.batch.length} | {case.rows * case.labels} | "
            f"{'all' if case.recompute else 'none'} | {case.dropout:g} | {case.zero} | "
            f"{row['estimated'] / 1e9:.3f} | {row['measured'] / 1e9:.3f} | {row['error']:+.1%} |"
        )
    worst = max(abs(row["error"]) for row in result["rows"])
    lines += ["", f"Largest error: {worst:.1%} (goal: 10 %)."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all cases, write and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--smallest", action="store_true", help="one small case only")
    parser.add_argument("--measure", help="for its own use")
    arguments = parser.parse_args()
    if arguments.measure:
        print(measure(Case(**json.loads(arguments.measure))))
        return
    rows = []
    for case in (SMALLEST,) if arguments.smallest else CASES:
        measured, estimated = in_process(case), predict(case)
        row = {"case": asdict(case), "estimated": estimated, "measured": measured}
        rows.append({**row, "error": estimated / measured - 1})
        print(f"{case}: {estimated / 1e9:.3f} of {measured / 1e9:.3f} GB", flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    result = {"machine": machine, "commit": commit(), "rows": rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "memory.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "memory.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
