"""The results of `gpu.py` beside the goals, as Markdown."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

GB = 1e9
Sections = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Goal:
    """A figure and what it should be."""

    what: str
    goal: float
    unit: str
    most: bool
    """Whether the goal is an upper limit."""
    figure: Callable[[Sections], float]
    """Raises `KeyError` where a section has no figures."""


def _memory(section: str, key: str = "allocated") -> Callable[[Sections], float]:
    return lambda found: found[section][key] / GB


def _utilisation(found: Sections) -> float:
    tune = found["tune"]
    return 100 * tune["flops"] / tune["seconds"] / found["speed"]["flops"]


def _floor(found: Sections) -> float:
    """Seconds in which the weights of one token are read."""
    return found["decode"]["weights_read"] / found["speed"]["bandwidth"]


def _fastest(found: Sections) -> float:
    """Seconds of a token at best, compiled or not."""
    times = [found["decode"]["static"], found.get("compiled", {}).get("compiled")]
    return min(time for time in times if time is not None)


def _evaluation(found: Sections) -> float:
    seconds = found["evaluation"]
    return seconds["batch 1"] / min(seconds["batch 32"], seconds["batch 32, fixed cache"])


GOALS = (
    Goal("a6000-fp16, tune, batch 4: peak allocated", 24.0, "GB", True, _memory("tune")),
    Goal("24g-fp16, tune, batch 4: peak allocated", 20.5, "GB", True, _memory("24g")),
    Goal("align: peak allocated", 18.5, "GB", True, _memory("align")),
    Goal("realign: peak allocated", 18.5, "GB", True, _memory("realign")),
    Goal("fast (selective recomputation): peak allocated", 30.0, "GB", True, _memory("fast")),
    Goal(
        "tokens/s beside HF's Trainer",
        1.8,
        "×",
        False,
        lambda found: found["tune"]["tokens_per_second"] / found["trainer"]["tokens_per_second"],
    ),
    Goal("model FLOP utilisation of tune", 45, "%", False, _utilisation),
    Goal(
        "decode, one row, 700 tokens of context, over the bandwidth floor",
        1.30,
        "×",
        True,
        lambda found: _fastest(found) / _floor(found),
    ),
    Goal(
        "decode beside HF's eager generate",
        4,
        "×",
        False,
        lambda found: found["decode"]["hf"] / _fastest(found),
    ),
    Goal("inference: peak allocated", 17.0, "GB", True, _memory("decode", "memory")),
    Goal("evaluation at batch 32 beside batch 1", 6, "×", False, _evaluation),
)
"""What is asked of one GPU at full size."""


def markdown(result: Mapping[str, Any]) -> str:
    """Return the whole result."""
    found: Sections = result["sections"]
    lines = [
        f"{result['device']}, size {result['size']}, torch {result['torch']}, "
        f"commit {result['commit']}",
        "",
    ]
    if result["size"] == "small":
        lines += ["At this size the figures only show that the benchmark works.", ""]
    lines += ["| figure | goal | measured |", "|---|---|---|"]
    lines += [_goal_line(goal, found) for goal in GOALS]
    lines += ["", "| training | GB allocated | GB reserved | tokens/s | s a step |"]
    lines += ["|---|---|---|---|---|"]
    for name, figures in found.items():
        if "tokens_per_second" in figures:
            lines.append(
                f"| {name} | {figures['allocated'] / GB:.2f} | {figures['reserved'] / GB:.2f} | "
                f"{figures['tokens_per_second']:.0f} | {figures['seconds']:.3f} |"
            )
    lines += _details(found)
    errors = {name: figures["error"] for name, figures in found.items() if "error" in figures}
    lines += ["", *(f"{name} failed: {error}" for name, error in errors.items())]
    return "\n".join(lines).rstrip() + "\n"


def _goal_line(goal: Goal, found: Sections) -> str:
    sign = "≤" if goal.most else "≥"
    try:
        value = f"{goal.figure(found):.2f} {goal.unit}"
    except KeyError:
        value = "not measured"
    return f"| {goal.what} | {sign} {goal.goal:g} {goal.unit} | {value} |"


def _details(found: Sections) -> list[str]:
    """Return what else was measured."""
    lines = []
    if "flops" in found.get("speed", {}):
        speed = found["speed"]
        lines.append(
            f"Matrix products {speed['flops'] / 1e12:.3g} TFLOP/s, copies "
            f"{speed['bandwidth'] / GB:.0f} GB/s."
        )
    if "hf" in found.get("decode", {}):
        decode = found["decode"]
        lines.append(
            f"A token takes {1e3 * decode['hf']:.2f} ms with HF's generate, "
            f"{1e3 * decode['static']:.2f} ms with a fixed cache."
        )
    if "compiled" in found.get("compiled", {}):
        graph = found["compiled"]
        lines.append(
            f"As a CUDA graph it takes {1e3 * graph['compiled']:.2f} ms, with a peak of "
            f"{graph['memory'] / GB:.2f} GB."
        )
    if "batch 1" in found.get("evaluation", {}):
        seconds = found["evaluation"]
        times = ", ".join(
            f"{name} {1e3 * seconds[name]:.0f} ms" for name in seconds if name != "wall"
        )
        lines.append(f"An item of evaluation takes: {times}.")
    return ["", *lines] if lines else []
