"""Ranks that wait for rank 0: longer than the group's timeout, and not for a dead one."""

import os
import signal
import time

import pytest
from train.conftest import _process_server as _process_server
from train.processes import Ranks, run_ranks

from mera_ds.distributed import ensure_launcher_variables, main_rank_alone, process_group, share
from mera_ds.errors import DataError, RankError

TIMEOUT = 2
"""Seconds of the group."""


def _alone(seconds: float) -> tuple[bool, str]:
    world = ensure_launcher_variables()
    with process_group(world, TIMEOUT):
        with main_rank_alone(world) as mine:
            if mine:
                time.sleep(seconds)
        return mine, share("rank 0 says so")


@pytest.mark.slow
def test_the_others_wait_longer_than_the_timeout() -> None:
    found = run_ranks(_alone, 2, 2.0 * TIMEOUT)
    assert found == [(True, "rank 0 says so"), (False, "rank 0 says so")]


def test_one_process_waits_for_nobody() -> None:
    assert run_ranks(_alone, 1, 0.0) == [(True, "rank 0 says so")]


def _failing() -> list[str]:
    world, messages = ensure_launcher_variables(), []
    with process_group(world, TIMEOUT):
        try:
            with main_rank_alone(world) as mine:
                if mine:
                    raise DataError("no score")
        except DataError as error:
            messages.append(str(error))
    return messages


def test_an_error_of_rank_0_is_everyones() -> None:
    assert run_ranks(_failing, 2) == [["no score"], ["no score"]]


def _dying() -> str:
    world = ensure_launcher_variables()
    try:
        with process_group(world, 60), main_rank_alone(world) as mine:
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
    except RankError as error:
        return str(error)
    return "nothing"


@pytest.mark.slow
def test_a_killed_rank_0_is_named() -> None:
    started = time.monotonic()
    ended = Ranks(_dying, 2).wait(60)
    assert ended[0].exit_code == -signal.SIGKILL
    assert time.monotonic() - started < 50
    assert "rank 0 ended" in str(ended[1].value) + ended[1].log
