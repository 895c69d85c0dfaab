"""Merging on a CPU, beside mergekit, peft and a plain copy.

python benchmarks/merge.py                                everything; makes a venv for the peers
                                                          in .venv-peers, or takes --peers FOLDER
python benchmarks/merge.py --no-peers --gigabytes 0.5     ours and the copy only

Two synthetic Llama checkpoints (fp16, three shards each) and a LoRA adapter are made on tmpfs,
where no disk hides anything. Outputs are compared first; then all commands run in turn, and the
least wall time of each counts, with its CPU seconds and its peak anonymous memory. The machine
should be quiet; it takes about eight minutes then, the installation of the peers left out.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from merge_inputs import (
    RANK,
    STAGE,
    Llama,
    differences,
    llama_of,
    make_adapter,
    make_checkpoint,
    make_sparse,
)
from merge_limits import delta_bytes, limits
from merge_tables import Run, markdown, plot, ratios, summary

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".venv-peers"
PEER_REPEATS = 2
"""Runs of the peers, which take most of the time, if ours are repeated more often."""
MEMORY_SIZES = (0.5, 1.0, 2.0, 4.0, 8.0)

COPY = """
import mmap, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
source, target = map(Path, sys.argv[1:])
target.mkdir()
started, jobs = time.perf_counter(), []
for file in sorted(source.glob("*.safetensors")):
    size = file.stat().st_size
    mapped = memoryview(mmap.mmap(os.open(file, os.O_RDONLY), 0, access=mmap.ACCESS_READ))
    out = os.open(target / file.name, os.O_RDWR | os.O_CREAT)
    os.ftruncate(out, size)
    jobs += [(mapped, out, start) for start in range(0, size, 4 << 20)]
with ThreadPoolExecutor(2) as threads:
    write = lambda job: os.pwrite(job[1], job[0][job[2]:job[2] + (4 << 20)], job[2])
    list(threads.map(write, jobs))
print("core", time.perf_counter() - started)
"""
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def measure(command: list[str]) -> Run:
    """Run a command to its end; refuse to go on if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peak = [0]

    def sample() -> None:
        while process.returncode is None:
            peak[0] = max(peak[0], anonymous_bytes(process.pid))
            time.sleep(0.01)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{output[-3000:]}")
    core = re.search(r"core ([\d.]+)", output)
    rate = re.search(r"\(([\d.]+) GB, ([\d.]+) GB/s\)", output)
    seconds = None
    if core is not None:
        seconds = float(core[1])
    elif rate is not None and float(rate[2]) > 0:
        seconds = float(rate[1]) / float(rate[2])
    return Run(wall, usage.ru_utime + usage.ru_stime, peak[0] / 1e9, seconds)


def anonymous_bytes(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


class Contest:
    """All commands over one set of inputs."""

    def __init__(self, work: Path, peers: Path | None) -> None:
        self.work = work
        self.commands: dict[str, list[str]] = {
            "copy, 2 threads": [sys.executable, "-c", COPY, str(work / "A"), self.out],
            "ours": self.ours(work / "B"),
            "ours, base + adapter": self.ours(work / "adapter"),
            "ours, dry run": [*self.ours(work / "B"), "--dry-run"],
        }
        self.peers: dict[str, list[str]] = {} if peers is None else self.of_peers(peers)
        self.commands |= self.peers

    @property
    def out(self) -> str:
        return str(self.work / "out")

    def ours(self, tuned: Path) -> list[str]:
        return [
            *(sys.executable, str(ROOT / "launch/merge.py"), "--previous", str(self.work / "A")),
            *("--tuned", str(tuned), "--stage", str(STAGE), "--out", self.out, "--workers", "2"),
        ]

    def of_peers(self, environment: Path) -> dict[str, list[str]]:
        merge = [str(environment / "bin/mergekit-yaml")]
        best = ["--async-write", "--write-threads", "2", "--out-shard-size", "500M"]
        cache = ["--lora-merge-cache", str(self.work / "lora-cache")]
        two = str(self.recipe("two.yaml", f"{self.work}/B"))
        adapted = str(self.recipe("adapter.yaml", f"{self.work}/A+{self.work}/adapter"))
        script = self.work / "merge_peft.py"
        script.write_text(PEFT)
        return {
            "mergekit, default": [*merge, two, self.out],
            "mergekit, best flags": [*merge, two, self.out, *best],
            "mergekit, base+lora": [*merge, adapted, self.out, *cache, *best],
            "peft, merge_and_unload": [
                *(str(environment / "bin/python"), str(script), str(self.work / "A")),
                *(str(self.work / "adapter-part"), self.out),
            ],
        }

    def recipe(self, name: str, tuned: str) -> Path:
        """Write mergekit's file for (i−1)/i · A + 1/i · tuned."""
        models = [(str(self.work / "A"), (STAGE - 1) / STAGE), (tuned, 1 / STAGE)]
        entries = "".join(
            f"  - model: {model}\n    parameters:\n      weight: {weight!r}\n"
            for model, weight in models
        )
        path = self.work / name
        path.write_text(f"merge_method: linear\ndtype: float16\nmodels:\n{entries}")
        return path

    def run(self, name: str, keep: Path | None = None) -> Run:
        """Run one command into a fresh folder; keep its output if asked to."""
        found = measure(self.commands[name])
        shutil.rmtree(self.work / "lora-cache", ignore_errors=True)
        if keep is not None:
            Path(self.out).rename(keep)
        else:
            shutil.rmtree(self.out, ignore_errors=True)
        return found


def compare_outputs(contest: Contest, llama: Llama) -> dict[str, Any]:
    """Run everything once, untimed, and require equal outputs."""
    found = {}
    for title, adapter, names in (
        ("two checkpoints", False, ("ours", "mergekit, best flags")),
        (
            "base + adapter",
            True,
            ("ours, base + adapter", "mergekit, base+lora", "peft, merge_and_unload"),
        ),
    ):
        folders = {}
        for number, name in enumerate(name for name in names if name in contest.commands):
            folders[name] = contest.work / f"kept{number}"
            contest.run(name, keep=folders[name])
        found[title] = differences(contest.work, llama, folders, adapter)
        for who, figures in found[title].items():
            limit = (0.9 if adapter else 0.55) if who.startswith("ours") else 100.0
            assert figures["largest_error_ulp"] <= limit, (who, figures)
            assert figures["frozen_identical"] or not who.startswith("ours"), (who, figures)
        for folder in folders.values():
            shutil.rmtree(folder)
    return found


def memory_by_size(work: Path, disk: Path, sizes: Sequence[float], hidden: int) -> dict[str, float]:
    """Return the peak anonymous memory of a merge, by gigabytes of the checkpoint."""
    found = {}
    for size in sizes:
        llama = llama_of(size, hidden)
        for name, value in (("A", 1), ("B", 2)):
            make_sparse(disk / name, llama, value)
        written = (disk / "A/model.safetensors").stat().st_size / 1e9
        command = [
            *(sys.executable, str(ROOT / "launch/merge.py"), "--previous", str(disk / "A")),
            *("--tuned", str(disk / "B"), "--stage", str(STAGE), "--out", str(work / "out")),
            *("--workers", "2"),
        ]
        found[f"{written:.2f}"] = round(measure(command).anonymous, 4)
        for folder in (disk / "A", disk / "B", work / "out"):
            shutil.rmtree(folder)
    return found


def hardware() -> str:
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", info)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{len(os.sched_getaffinity(0))} × {model[1] if model else platform.machine()}, "
        f"{memory:.0f} GiB, Python {platform.python_version()}, torch {torch.__version__}"
    )


def ensure_peers(environment: Path) -> None:
    """Install mergekit and peft into a virtual environment of their own."""
    if (environment / "bin/mergekit-yaml").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    packages = ["mergekit==0.1.5", "peft", "torch", "transformers"]
    pip = [str(environment / "bin/pip"), "install", "-q", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, *packages], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.2, help="of each checkpoint")
    parser.add_argument("--hidden", type=int, default=2048, help="width of the models")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/mera-merge"))
    parser.add_argument("--disk", type=Path, default=ROOT / "build/merge", help="sparse files")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--peers", type=Path, default=PEERS, help="virtual environment of theirs")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--memory-sizes", type=float, nargs="*", default=list(MEMORY_SIZES))
    arguments = parser.parse_args()
    if not arguments.no_peers:
        ensure_peers(arguments.peers)
    try:
        results = benchmark(arguments)
    finally:
        for folder in (arguments.work, arguments.disk):
            shutil.rmtree(folder, ignore_errors=True)
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "merge.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.results / "merge.md").write_text(markdown(results))
    plot(results["memory"], arguments.results / "merge-memory.png")
    print(markdown(results))


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the inputs, compare the outputs, run everything; return all figures."""
    work, llama = arguments.work, llama_of(arguments.gigabytes, arguments.hidden)
    load = [round(os.getloadavg()[0], 2)]
    for number, name in enumerate("AB"):
        make_checkpoint(work / name, llama, number)
    make_adapter(work / "adapter", work / "A", llama, RANK)
    make_adapter(work / "adapter-part", work / "A", llama, RANK / STAGE)
    contest = Contest(work, None if arguments.no_peers else arguments.peers.absolute())
    accuracy = compare_outputs(contest, llama)
    runs: dict[str, list[Run]] = {name: [] for name in contest.commands}
    for repeat in range(arguments.repeats):
        for name, found in runs.items():
            if name in contest.peers and repeat >= PEER_REPEATS:
                continue
            found.append(contest.run(name))
            print(f"{repeat + 1}  {name:24}  {found[-1]}", file=sys.stderr, flush=True)
    load.append(round(os.getloadavg()[0], 2))
    table = summary(runs)
    gigabytes = sum(file.stat().st_size for file in (work / "A").glob("*.safetensors")) / 1e9
    delta = (work / "adapter/adapter_model.safetensors").stat().st_size
    for name in ("A", "B"):
        shutil.rmtree(work / name)
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "hardware": hardware(),
        "commit": commit or "unknown",
        "load": load,
        "gigabytes": gigabytes,
        "repeats": arguments.repeats,
        "table": table,
        "ratios": ratios(table),
        "limits": limits(work, llama, table),
        "delta_bytes": delta,
        "delta_8b": delta_bytes(),
        "accuracy": accuracy,
        "memory": memory_by_size(
            work, arguments.disk, tuple(arguments.memory_sizes), arguments.hidden
        ),
    }


if __name__ == "__main__":
    main()
