"""A merge that is stopped: no folder looks complete; the same command ends with the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mera_ds.errors import DataError, InputError, LockedError
from mera_ds.files import FAILPOINT_VARIABLE
from mera_ds.merge import digest, stream
from mera_ds.merge.partial import STATE, partial_folder
from mera_ds.merge.state_dicts import carry_out, prepare_merge

from .models import base_model, checkpoint, contents, moved

MERGE = """
import sys
from pathlib import Path
from mera_ds.merge import digest, stream
from mera_ds.merge.state_dicts import carry_out, prepare_merge
digest.BLOCK, stream.SPAN = 256, 128
previous, tuned, out = map(Path, sys.argv[1:])
carry_out(prepare_merge(previous, tuned, 2, out, shard_size=10_000), out, workers=2)
"""
Pair = tuple[Path, Path]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks as small here as in the processes that are killed."""
    monkeypatch.setattr(digest, "BLOCK", 256)
    monkeypatch.setattr(stream, "SPAN", 128)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    previous = checkpoint(tmp_path / "previous", base_model(), "8KB")
    return previous, checkpoint(tmp_path / "tuned", moved(base_model(), 1))


def start(pair: Pair, out: Path, point: str = "") -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", MERGE, *map(str, (*pair, out))],
        env={**os.environ, FAILPOINT_VARIABLE: point},
        cwd=Path(__file__).parents[2],
    )


def merge(pair: Pair, out: Path) -> dict[str, bytes]:
    carry_out(prepare_merge(*pair, 2, out, shard_size=10_000), out)
    return contents(out)


def weights(folder: Path) -> dict[str, int]:
    """Return when each finished file of an unfinished merge was written."""
    done = json.loads((folder / STATE).read_text())["done"]
    return {name: (folder / name).stat().st_mtime_ns for name in done}


@pytest.mark.parametrize(
    ("point", "finished"),
    [
        ("merge.after_block:2", 0),
        ("merge.before_record:2", 0),
        ("merge.after_file:1", 1),
        ("merge.after_file:4", 4),
        ("merge.before_publish", None),
        ("commit.before_rename", None),
    ],
)
def test_kill_9_and_the_same_command_again(
    pair: Pair, tmp_path: Path, point: str, finished: int | None
) -> None:
    inputs = [contents(folder) for folder in pair]
    expected = merge(pair, tmp_path / "expected")
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    assert start(pair, out, point).wait() == -signal.SIGKILL
    assert not out.exists()
    assert (partial / "config.json").exists() == (finished is None)
    before = weights(partial) if finished is not None else {}
    assert len(before) >= (finished or 0)
    found = merge(pair, out)
    assert found.keys() == expected.keys()
    assert found == expected
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert not partial.exists()
    assert [contents(folder) for folder in pair] == inputs


def test_kill_9_after_the_end(pair: Pair, tmp_path: Path) -> None:
    assert start(pair, tmp_path / "out", "commit.after_rename").wait() == -signal.SIGKILL
    assert contents(tmp_path / "out") == merge(pair, tmp_path / "expected")


@pytest.mark.slow
def test_kill_9_at_any_time(pair: Pair, tmp_path: Path) -> None:
    """Twelve times at a random moment of its second half, the start of Python left out."""
    expected = merge(pair, tmp_path / "expected")
    chance = random.Random(0)
    started = time.monotonic()
    start(pair, tmp_path / "timed").wait()
    whole = time.monotonic() - started
    for number in range(12):
        out = tmp_path / f"out{number}"
        process = start(pair, out)
        time.sleep(whole * chance.uniform(0.5, 1.0))
        process.kill()
        process.wait()
        if out.exists():
            assert contents(out) == expected
        else:
            assert merge(pair, out) == expected


@contextmanager
def killed(pair: Pair, out: Path) -> Iterator[Path]:
    """Yield the folder of a merge that was killed behind its second file."""
    assert start(pair, out, "merge.after_file:2").wait() == -signal.SIGKILL
    yield out.with_name(f"{out.name}.partial")


def test_a_finished_file_that_was_damaged_is_written_again(pair: Pair, tmp_path: Path) -> None:
    expected = merge(pair, tmp_path / "expected")
    with killed(pair, tmp_path / "out") as partial:
        first, *_ = weights(partial)
        content = bytearray((partial / first).read_bytes())
        content[-5] ^= 4
        (partial / first).write_bytes(content)
        assert merge(pair, tmp_path / "out") == expected


def test_other_settings_are_refused(pair: Pair, tmp_path: Path) -> None:
    with killed(pair, tmp_path / "out") as partial:
        before = contents(partial)
        plan = prepare_merge(*pair, 3, tmp_path / "out", shard_size=10_000)
        with pytest.raises(InputError, match=r"out\.partial holds finished files of a merge of ot"):
            carry_out(plan, tmp_path / "out")
        assert contents(partial) == before


def test_other_inputs_are_refused(pair: Pair, tmp_path: Path) -> None:
    with killed(pair, tmp_path / "out"):
        checkpoint(pair[1], moved(base_model(), 2))
        with pytest.raises(InputError, match="give its command again to complete it, or delete"):
            merge(pair, tmp_path / "out")


def test_a_merge_of_others_without_a_finished_file_is_replaced(pair: Pair, tmp_path: Path) -> None:
    expected = merge(pair, tmp_path / "expected")
    plan = prepare_merge(*pair, 3, tmp_path / "out")
    with partial_folder(tmp_path / "out", plan) as partial:
        partial.resume(1)
        (partial.folder / "half a file").write_text("x")
    assert merge(pair, tmp_path / "out") == expected


def test_a_folder_of_somebody_else_is_refused(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "out.partial/photos").mkdir(parents=True)
    (tmp_path / "out.partial/notes").write_text("x")
    with pytest.raises(InputError, match="photos was not made by a merge; move it away"):
        merge(pair, tmp_path / "out")
    assert (tmp_path / "out.partial/notes").exists()
    (tmp_path / "out2.partial").write_text("x")
    with pytest.raises(InputError, match=r"out2\.partial is no folder"):
        merge(pair, tmp_path / "out2")


def test_a_state_that_is_none_is_refused(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / STATE).write_text("[]")
    with pytest.raises(
        InputError, match=r"state\.json is not that of a merge; delete .*out\.partial"
    ):
        merge(pair, tmp_path / "out")


def test_two_at_the_same_output(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = prepare_merge(*pair, 2, out, shard_size=10_000)
    with partial_folder(out, plan) as partial:
        partial.resume(1)
        before = contents(partial.folder)
        with pytest.raises(LockedError, match=r"out\.partial is in use by another merge into"):
            carry_out(plan, out)
        assert contents(partial.folder) == before


def test_an_output_that_appeared_meanwhile(pair: Pair, tmp_path: Path) -> None:
    plan = prepare_merge(*pair, 2, tmp_path / "out", shard_size=10_000)
    merge(pair, tmp_path / "out")
    with pytest.raises(InputError, match="out exists; delete it"):
        carry_out(plan, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_stop_keeps_what_is_done(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = merge(pair, tmp_path / "expected")
    plan = prepare_merge(*pair, 2, tmp_path / "out", shard_size=10_000)

    def stop(written: int) -> None:
        if written and len(weights(tmp_path / "out.partial")) >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(plan, tmp_path / "out", progress=stop)
    assert len(weights(tmp_path / "out.partial")) >= 2
    assert merge(pair, tmp_path / "out") == expected


def test_an_error_leaves_nothing(pair: Pair, tmp_path: Path) -> None:
    plan = prepare_merge(*pair, 2, tmp_path / "out", shard_size=10_000)

    def fail(written: int) -> None:
        if written:
            raise DataError("something is wrong")

    with pytest.raises(DataError, match="something is wrong"):
        carry_out(plan, tmp_path / "out", progress=fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["previous", "tuned"]
