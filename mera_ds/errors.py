"""Errors a user can act on, each with its exit status (one table for all commands).

Every message names the thing that is wrong (file, sample, key or flag) and the remedy. Commands
print the message alone, without a traceback, and exit with `exit_code`.
"""


class MeraError(Exception):
    """Base of all errors that end a command with one clear message."""

    exit_code = 2


class InputError(MeraError):
    """Bad input, configuration or order of commands (exit 2)."""

    exit_code = 2


class DataError(MeraError):
    """A file or sample does not hold what its index or manifest says (exit 3)."""

    exit_code = 3


class NumericError(MeraError):
    """Too many non-finite losses or gradients (exit 4)."""

    exit_code = 4


class ResourceError(MeraError):
    """Disk or memory does not suffice (exit 5)."""

    exit_code = 5


class LockedError(MeraError):
    """Another process works on the same run (exit 6)."""

    exit_code = 6


class RankError(MeraError):
    """A rank died or stalled; running the same command again continues (exit 75)."""

    exit_code = 75


class Interrupted(MeraError):
    """SIGTERM or Ctrl-C, after the state was saved (exit 143)."""

    exit_code = 143
