"""What is said of one needed file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mera_ds.errors import DataError, InputError

State = Literal["found", "missing", "wrong", "later"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A file or folder that is needed."""

    what: str
    path: Path | str
    """Where it was looked for; of what lies elsewhere, the URL."""
    state: State
    """`later`: it will be made by `mera-ds init`."""
    detail: str
    """What was found, or what is wrong."""
    source: str
    """Where it comes from, or how it is made."""

    @property
    def fine(self) -> bool:
        """Whether nothing has to be done."""
        return self.state in ("found", "later")


def look(what: str, path: Path, source: str, check: Callable[[Path], str]) -> Finding:
    """Check a file or folder.

    Args:
        what: what it is for.
        path: where it is looked for.
        source: where it comes from.
        check: describes a sound one; raises `InputError` if something is missing in it and
            `DataError` if something is wrong with it.
    """

    def described() -> str:
        if not path.exists():
            raise InputError("it does not exist")
        return check(path)

    return describe(what, path, source, described)


def describe(what: str, place: Path | str, source: str, check: Callable[[], str]) -> Finding:
    """Do the same for what need not be a file here: the check itself looks whether it exists."""
    state: State = "found"
    try:
        detail = check()
    except InputError as error:
        state, detail = "missing", str(error)
    except (DataError, OSError) as error:
        state, detail = "wrong", str(error)
    return Finding(what=what, path=place, state=state, detail=detail, source=source)
