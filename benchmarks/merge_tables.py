"""Figures of the benchmark of merging, as tables and a picture."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """One execution of a command."""

    wall: float
    cpu: float
    anonymous: float
    """Peak, in GB."""
    core: float | None
    """Seconds of the loop alone, where the command says it."""


def plot(memory: Mapping[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3))
    axes.plot([float(size) for size in memory], [1000 * value for value in memory.values()], "o-")
    axes.axhline(350, color="grey", linestyle="--", label="limit")
    axes.set(xlabel="checkpoint, GB", ylabel="peak anonymous memory, MB", ylim=(0, 400))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def summary(runs: Mapping[str, list[Run]]) -> dict[str, dict[str, Any]]:
    """Return the least wall time and its companions per command."""
    return {
        name: {
            "wall_s": round(min(run.wall for run in found), 3),
            "wall_median_s": round(statistics.median(run.wall for run in found), 3),
            "cpu_s": round(min(run.cpu for run in found), 3),
            "anonymous_gb": round(max(run.anonymous for run in found), 3),
            "core_s": _least([run.core for run in found if run.core is not None]),
            "runs": [asdict(run) for run in found],
        }
        for name, found in runs.items()
    }


def _least(seconds: list[float]) -> float | None:
    return round(min(seconds), 3) if seconds else None


def ratios(table: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures that the goals are about, as far as both sides were measured."""
    adapted = "ours, base + adapter"
    wanted = {
        "mergekit best flags / ours, wall": ("mergekit, best flags", "ours", "wall_s"),
        "mergekit default / ours, wall": ("mergekit, default", "ours", "wall_s"),
        "mergekit best flags / ours, CPU": ("mergekit, best flags", "ours", "cpu_s"),
        "ours / mergekit best flags, memory": ("ours", "mergekit, best flags", "anonymous_gb"),
        "ours / copy, core loop": ("ours", "copy, 2 threads", "core_s"),
        "mergekit base+lora / ours, CPU": ("mergekit, base+lora", adapted, "cpu_s"),
        "mergekit base+lora / ours, wall": (
            "mergekit, base+lora",
            "ours, base + adapter",
            "wall_s",
        ),
        "peft / ours, wall": ("peft, merge_and_unload", adapted, "wall_s"),
        "ours / peft, memory": (adapted, "peft, merge_and_unload", "anonymous_gb"),
    }
    return {
        title: round(table[one][key] / table[other][key], 3)
        for title, (one, other, key) in wanted.items()
        if one in table and other in table and table[one][key] and table[other][key]
    }


def _limit(name: str, parts: Mapping[str, float]) -> str:
    """Return one line: the parts, their sum, and how far from it the measured time is."""
    floor = sum(seconds for part, seconds in parts.items() if part != "measured")
    said = " + ".join(
        f"{part} {seconds:.2f}" for part, seconds in parts.items() if part != "measured"
    )
    measured = parts["measured"]
    return f"- {name}: {said} = {floor:.2f}; measured {measured:.2f}, {measured / floor:.2f} times"


def _of_8b(sizes: Mapping[str, float]) -> str:
    """Return the share of a delta of a wide model, by exact count."""
    model = sizes["model_fp16"]
    return (
        f"- at the shapes of Llama-3-8B ({model:.2f} GB in fp16), rank 128 on all linear layers: "
        f"factors in fp32 are {sizes['fp32']:.2f} GB, 1/{model / sizes['fp32']:.1f}; in fp16 "
        f"{sizes['fp16']:.2f} GB, 1/{model / sizes['fp16']:.1f}"
    )


def markdown(results: Mapping[str, Any]) -> str:
    rows = [
        f"| {name} | {found['wall_s']:.2f} | {found['core_s'] or '–'} | {found['cpu_s']:.2f} | "
        f"{found['anonymous_gb']:.3f} |"
        for name, found in results["table"].items()
    ]
    accuracy = [
        f"| {title} | {who} | {100 * found['not_nearest']:.3g} % | {found['largest_error_ulp']} | "
        f"{'yes' if found['frozen_identical'] else 'no'} |"
        for title, whos in results["accuracy"].items()
        for who, found in whos.items()
    ]
    return "\n".join(
        [
            f"# Merging, {results['gigabytes']:.2f} GB per checkpoint, tmpfs",
            "",
            f"{results['hardware']}; commit {results['commit']}; load average before and after "
            f"{results['load']}; "
            f"least of {results['repeats']} interleaved runs, of the peers' two at most.",
            "",
            "| | wall s | core loop s | CPU s | peak anonymous GB |",
            "|---|---|---|---|---|",
            *rows,
            "",
            *(f"- {title}: {value}" for title, value in results["ratios"].items()),
            f"- the adapter alone is {results['delta_bytes'] / 1e6:.0f} MB, "
            f"1/{results['gigabytes'] * 1e9 / results['delta_bytes']:.1f} of the merged weights",
            "",
            _of_8b(results["delta_8b"]),
            "",
            "What each takes at least, in seconds: its bytes at the speed of the plain copy, its "
            "arithmetic at the speed on one span that stays in the cache, on two threads.",
            "",
            *(_limit(name, parts) for name, parts in results["limits"].items()),
            "",
            "Against the merge in fp64 (rounding to nearest is at most 0.5 ulp):",
            "",
            "| | | not nearest | largest error, ulp | frozen tensors identical |",
            "|---|---|---|---|---|",
            *accuracy,
            "",
            "Peak anonymous memory by size: "
            + ", ".join(f"{size} GB: {gb} GB" for size, gb in results["memory"].items())
            + ".",
            "",
        ]
    )
