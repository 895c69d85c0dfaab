"""What a phase was begun with is kept as long as it has checkpoints, and changes are named."""

from pathlib import Path
from typing import Any

import pytest

from mera_ds.errors import InputError
from mera_ds.train.inputs import differences, keep_inputs

BEFORE: dict[str, Any] = {"seed": 0, "settings": {"rate": 0.1, "tasks": ("caption", "qa")}}


@pytest.mark.parametrize(
    ("now", "found"),
    [
        ({"seed": 0, "settings": {"rate": 0.1, "tasks": ["caption", "qa"]}}, []),
        ({**BEFORE, "seed": 1}, ["seed: 0 before, 1 now"]),
        ({"seed": 0, "settings": {"rate": 0.1}}, ["settings.tasks: ('caption', 'qa') before"]),
        ({**BEFORE, "new": {"a": 1}}, ["new: None before, {'a': 1} now"]),
    ],
)
def test_every_difference_is_named(now: dict[str, Any], found: list[str]) -> None:
    lines = list(differences(BEFORE, now))
    assert len(lines) == len(found)
    assert all(line.startswith(start) for line, start in zip(lines, found, strict=True))


def test_they_count_only_while_there_are_checkpoints(tmp_path: Path) -> None:
    phase = tmp_path / "align"
    keep_inputs(phase, BEFORE)
    keep_inputs(phase, {**BEFORE, "seed": 1})
    checkpoint = phase / "step-000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}", encoding="utf-8")
    keep_inputs(phase, {**BEFORE, "seed": 1})
    with pytest.raises(InputError, match=r"step-000002 was made .* now: seed: 1 before, 0 now; re"):
        keep_inputs(phase, BEFORE)
