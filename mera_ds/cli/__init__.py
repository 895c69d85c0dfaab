"""The command `mera-ds`: parse, call, print.

Importing this package costs `launch/*.py` nothing: the commands are imported by `mera-ds` alone,
and heavy modules by the commands.
"""

import os
from typing import NoReturn

from mera_ds.cli.launch import guarded, leave, parse_with_overrides

# Read when torch loads its OpenMP library. Threads that never stop spinning while they wait cost a
# busy machine more than a factor of ten; threads that sleep at once, a quiet one a third of its
# speed. So they spin for about a millisecond.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "100000")


def command_line() -> NoReturn:
    """Run the command that this process was started with, and end the process."""
    leave(main())


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit status (see `mera_ds.errors`)."""
    from mera_ds.cli.commands import parser

    parsed = parse_with_overrides(parser(), arguments)
    return guarded(lambda: parsed.command(parsed))
