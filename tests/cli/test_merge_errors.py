"""The page of error messages is what the program prints; each names its remedy."""

import pytest

from mera_ds.errors import DataError, InputError

from .merge_errors import CASES, PAGE, Case, outcome, page


def test_the_page_is_what_is_printed() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.cli.merge_errors"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_it_is_one_message_with_a_status(case: Case) -> None:
    status, printed = outcome(case)
    assert status in (InputError.exit_code, DataError.exit_code)
    assert printed.startswith("error: ")
    assert "Traceback" not in printed
