"""The command `mera-ds judge-agreement`: two judges on the predictions that runs have stored."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mera_ds.cli.launch import DEFAULT_RUN
from mera_ds.config import EvaluateConfig, cache_folder, load_config
from mera_ds.errors import InputError
from mera_ds.settings import apply_overrides, dump, parse

if TYPE_CHECKING:
    from mera_ds.evaluate.agreement import Agreement
    from mera_ds.evaluate.judge import Judge

JUDGES = ("offline-exact", "offline-containment", "openai")


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    compare = commands.add_parser(
        "judge-agreement",
        help="how far two judges agree on the same predictions",
        epilog="evaluate.judge_KEY=VALUE overrides the settings of the judge 'openai'.",
    )
    compare.add_argument("runs", type=Path, nargs="*", default=[Path(DEFAULT_RUN)])
    compare.add_argument("--judge", choices=JUDGES, default=JUDGES[0], help="default: %(default)s")
    compare.add_argument("--other", choices=JUDGES, default=JUDGES[2], help="default: %(default)s")
    compare.set_defaults(command=judge_agreement, overrides=())


def judge_agreement(arguments: argparse.Namespace) -> None:
    """Print agreement, Cohen's kappa and the confusion table of two judges, by test and in total.

    Raises:
        InputError: if a run has no answers yet, both judges are the same, or a setting is wrong.
    """
    from mera_ds.evaluate.agreement import compare_judges, in_total
    from mera_ds.evaluate.predictions import load_predictions, scored_tests
    from mera_ds.evaluate.score import judge_items
    from mera_ds.log import set_up_console

    set_up_console()
    if arguments.judge == arguments.other:
        raise InputError(f"--judge and --other are both '{arguments.judge}'; name two")
    found = []
    names = ("", "")
    for run in arguments.runs:
        judges = [
            _judge(run, name, arguments.overrides) for name in (arguments.judge, arguments.other)
        ]
        names = (judges[0].name, judges[1].name)
        tests = [test for test in scored_tests(run) if test.row["task"] == "qa"]
        if not tests:
            raise InputError(f"{run} has no judged answers yet; 'mera-ds run {run}' makes them")
        for test in tests:
            items = judge_items(load_predictions(test.predictions))
            verdicts = [judge.judge(items) for judge in judges]
            found.append(compare_judges(*verdicts))
            where = f"{run.name} stage {test.row['stage']} {test.row['dataset']}"
            print(f"{where:40s} {_line(found[-1])}")
    total = in_total(found)
    print(f"{'all':40s} {_line(total)}\n\n{_confusion(total, *names)}")


def _judge(run: Path, name: str, overrides: list[str]) -> "Judge":
    from mera_ds.evaluate.score import make_judge

    for text in overrides:
        if not text.startswith("evaluate.judge_"):
            raise InputError(f"'{text}' can't be set here; only evaluate.judge_… can")
    inner = [text.removeprefix("evaluate.") for text in (*overrides, f"evaluate.judge={name}")]
    settings = apply_overrides(dump(load_config(run).evaluate), inner)
    return make_judge(
        parse(EvaluateConfig, settings, "evaluate"), cache_folder() / "judgements.jsonl"
    )


def _line(found: "Agreement") -> str:
    share = "-" if found.agreement is None else f"{100 * found.agreement:.1f} %"
    kappa = "-" if found.kappa is None else f"{found.kappa:.3f}"
    missing = sum(found.table.values()) - found.judged
    return f"agreement {share:>8s}  kappa {kappa:>6s}  items {found.judged} (missing {missing})"


def _confusion(found: "Agreement", first: str, second: str) -> str:
    """Return the table of what both said, with each judge's accuracy."""
    from mera_ds.evaluate.agreement import ANSWERS

    width = max(len(first), 8) + 2
    head = "".join(f"{answer:>10s}" for answer in ANSWERS)
    lines = [f"{'':{width}s}{second}", f"{first:{width}s}{head}"]
    for one in ANSWERS:
        cells = "".join(f"{found.table[one, other]:10d}" for other in ANSWERS)
        lines.append(f"{one:>{width - 2}s}  {cells}")
    for name, place in ((first, 0), (second, 1)):
        value = found.accuracy(place)
        lines.append(f"accuracy by {name}: {'-' if value is None else f'{value:.3f}'}")
    return "\n".join(lines)
