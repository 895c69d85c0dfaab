"""docs/faults.md has every row, and names tests that exist."""

import re

from mera_ds.config import REPOSITORY

TEXT = (REPOSITORY / "docs/faults.md").read_text(encoding="utf-8")


def test_every_row_is_there() -> None:
    rows = re.findall(r"^\| (\d+) \|.*tests/.* \|$", TEXT, flags=re.MULTILINE)
    assert [int(row) for row in rows] == list(range(1, 25))


def test_every_test_exists() -> None:
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", TEXT)
    assert len(named) > 50
    missing = [
        f"{path}::{name}"
        for path, name in named
        if f"def {name}(" not in (REPOSITORY / path).read_text(encoding="utf-8")
    ]
    assert missing == []
