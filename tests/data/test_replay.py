"""Replay lists: nested, stratified by task, fixed by the seed."""

import math
from itertools import pairwise

import pytest

from mera_ds.data.replay import replay_sample

COUNTS = {"caption": 237, "qa": 1003}
TASKS = [task for task, count in COUNTS.items() for _ in range(count)]
IDS = [f"set/key{number}#0" for number in range(len(TASKS))]


def names(percent: float, seed: int = 0) -> set[str]:
    return {IDS[position] for position in replay_sample(IDS, TASKS, percent, seed)}


@pytest.mark.parametrize("percent", [0.01, 1, 7.5, 10, 33.3, 100])
def test_each_task_gives_its_share_rounded_up(percent: float) -> None:
    chosen = replay_sample(IDS, TASKS, percent, seed=0)
    assert chosen == sorted(set(chosen))
    for task, count in COUNTS.items():
        found = sum(TASKS[position] == task for position in chosen)
        assert found == math.ceil(count * percent / 100)


def test_a_whole_share_is_not_rounded_up() -> None:
    ids = [str(number) for number in range(3000)]
    assert len(replay_sample(ids, ["qa"] * 3000, 1.1, seed=0)) == 33


@pytest.mark.parametrize("seed", range(3))
def test_smaller_lists_are_part_of_larger_ones(seed: int) -> None:
    lists = [names(percent, seed) for percent in (1, 5, 10, 50, 100)]
    for smaller, larger in pairwise(lists):
        assert smaller < larger
    assert lists[-1] == set(IDS)


def test_the_seed_decides_and_nothing_else() -> None:
    assert names(10, seed=1) == names(10, seed=1)
    assert names(10, seed=1) != names(10, seed=2)


def test_a_known_list_stays_what_it_is() -> None:
    """Runs name their replay units; another release must choose the same."""
    ids = [f"image/{number}#0" for number in range(20)]
    assert replay_sample(ids, ["qa"] * 20, 25, seed=0) == [1, 3, 5, 9, 14]


def test_the_order_of_the_units_has_no_influence() -> None:
    backwards = replay_sample(IDS[::-1], TASKS[::-1], 10, seed=0)
    assert {IDS[::-1][position] for position in backwards} == names(10)


@pytest.mark.parametrize("task", COUNTS)
def test_a_unit_stays_whatever_becomes_of_the_others(task: str) -> None:
    """With fewer units only the last ones drawn leave, or only spared ones are added."""
    before = {IDS[p] for p in replay_sample(IDS, TASKS, 10, seed=0) if TASKS[p] == task}
    kept = [position for position in range(len(IDS)) if position % 5]
    ids, tasks = [IDS[p] for p in kept], [TASKS[p] for p in kept]
    after = {ids[p] for p in replay_sample(ids, tasks, 10, seed=0) if tasks[p] == task}
    survivors = before & set(ids)
    assert survivors
    assert after <= survivors or survivors <= after


def test_a_rare_task_is_never_lost() -> None:
    chosen = replay_sample(["a", "b", "c"], ["qa", "caption", "qa"], 1, seed=0)
    assert 1 in chosen
    assert len(chosen) == 2
