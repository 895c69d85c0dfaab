"""The command `mera-ds doctor`: is everything there that a run needs?"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mera_ds.cli.launch import DEFAULT_RUN
from mera_ds.config import RunConfig, load_config, load_profile, shards_folder, weights_folder
from mera_ds.doctor import Fact, Finding, environment, examine
from mera_ds.errors import InputError

MARKS = {"found": "found", "missing": "MISSING", "wrong": "WRONG", "later": "later"}


def doctor(arguments: argparse.Namespace) -> None:
    """Print every file that a run or profile needs, and the environment.

    Raises:
        InputError: if something is missing or wrong.
    """
    run, config = _subject(arguments)
    findings: Sequence[Finding] = []
    if config is not None:
        findings = examine(config, run)
        print(f"{run or config.profile}: files")
        for finding in findings:
            _print_finding(finding)
        print(f"  {{weights}} is {weights_folder()} ($MERA_WEIGHTS)")
        print(f"  {{shards}} is {shards_folder()} ($MERA_SHARDS)")
    facts = environment(config, run or Path())
    print("environment")
    for fact in facts:
        print(f"  {'ok' if fact.fine else 'MISSING':8s} {fact.name:18s} {fact.value}")
    _refuse(findings, facts)


def _subject(arguments: argparse.Namespace) -> tuple[Path | None, RunConfig | None]:
    """Return the run's folder and the configuration to look at, as far as there are any."""
    if arguments.profile is not None:
        if arguments.run is not None:
            raise InputError("doctor takes a run or --profile, not both")
        return None, load_profile(arguments.profile, arguments.overrides)
    run = arguments.run or Path(DEFAULT_RUN)
    if arguments.run is None and not (run / "config.yaml").exists():
        return None, None
    return run, load_config(run, arguments.overrides)


def _print_finding(finding: Finding) -> None:
    print(f"  {MARKS[finding.state]:8s} {finding.what}")
    print(f"           {finding.path}: {finding.detail}")
    if not finding.fine:
        print(f"           from {finding.source}")


def _refuse(findings: Sequence[Finding], facts: Sequence[Fact]) -> None:
    bad = sum(not finding.fine for finding in findings) + sum(not fact.fine for fact in facts)
    if bad:
        raise InputError(
            f"{bad} of {len(findings) + len(facts)} things are missing or wrong; the lines "
            "above say where each comes from"
        )
