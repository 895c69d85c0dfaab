"""Row 20 and the key of docs/faults.md; the judge itself: tests/evaluate/test_judge.py."""

from collections.abc import Callable
from pathlib import Path

import pytest
from evaluate.chat_server import ChatServer, completion, failure
from evaluate.conftest import server as server
from train.processes import Ended, Ranks, train_command

CANARY = "sk-canary-1f0e9d8c7b6a"


def _score(run: Path) -> None:
    import sys

    from mera_ds.cli import launch

    sys.argv = ["score.py", "--run", str(run), "--modality", "image"]
    sys.exit(launch.score())


def score(run: Path) -> Ended:
    return Ranks(_score, 1, run, environment={"OPENAI_API_KEY": CANARY}).wait()[0]


def test_no_byte_that_the_commands_write_holds_the_key(
    server: ChatServer,
    make_tiny_run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Judging that fails is no score (exit 3); judging that works is one; neither shows the key."""
    monkeypatch.setenv("MERA_CACHE", str(tmp_path / "cache"))
    run = make_tiny_run(
        "order=[image]",
        "align.max_steps=1",
        "tune.max_steps=1",
        "evaluate.judge=openai",
        f"evaluate.judge_base_url={server.url}",
        "evaluate.judge_prices=[0,0]",
        "evaluate.max_new_tokens=2",
    )
    (trained,) = train_command(run, "image", phases=("align", "tune")).wait()
    assert trained.exit_code == 0, trained.log
    server.respond = lambda number, payload: failure(400, f"the key {CANARY} is bad")
    missing = score(run)
    assert missing.exit_code == 3, missing.log
    assert "so there is no final score; run the same command again" in missing.log
    server.respond = lambda number, payload: completion("{'pred': 'yes', 'score': 5}")
    judged = score(run)
    assert judged.exit_code == 0, judged.log
    places = [*tmp_path.rglob("*"), *run.rglob("*")]
    texts = [path.read_bytes() for path in places if path.is_file()]
    texts += [end.log.encode() for end in (trained, missing, judged)]
    assert len(texts) > 10
    assert not any(CANARY.encode() in text for text in texts)
