"""Which samples may stand in a shard folder. The writer refuses others, lint names them."""

import re
from collections.abc import Iterable, Sequence

from mera_ds.shards.format import MAX_MEMBER_BYTES, TASKS, Choices, Text

IDS_FILE = "ids.txt"
"""Beside an index: the samples of the folder, a line each: key, `#`, id of the text."""
LEFT_OUT_FILE = "left_out.txt"
"""Beside an index: media of the source that are not in the folder, and why."""
SIDE_FILES = (IDS_FILE, LEFT_OUT_FILE)
"""What may lie beside an index; its recipe lists them under `files`, with their hashes."""

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_EXTENSION = re.compile(r"[a-z0-9]{1,8}")


def sample_problems(
    key: str,
    extension: str,
    media_size: int,
    concept: str,
    texts: tuple[Text, ...],
    choices: Choices,
) -> list[str]:
    """Return what keeps a sample out of a shard folder; an empty list if nothing does."""
    problems = []
    if not _KEY.fullmatch(key):
        problems.append("the key must be 1 to 80 of A-Z a-z 0-9 _ - and not start with -")
    if not _EXTENSION.fullmatch(extension) or extension == "json":
        problems.append(f"the extension {extension!r} must be 1 to 8 of a-z 0-9 and not json")
    if not 0 < media_size <= MAX_MEMBER_BYTES:
        problems.append(f"the medium has {media_size} bytes, allowed: 1 to {MAX_MEMBER_BYTES}")
    if not concept.strip():
        problems.append("the concept is empty")
    if not texts:
        problems.append("it has no text")
    if len({text.id for text in texts}) != len(texts):
        problems.append("two of its texts have the same id")
    for text in texts:
        problems += [f"text {text.id!r}: {line}" for line in _text_problems(text, choices)]
    return problems


def _text_problems(text: Text, choices: Choices) -> list[str]:
    if text.task not in TASKS:
        return [f"unknown task {text.task!r}, expected one of {', '.join(TASKS)}"]
    problems = []
    if not text.answers or not all(answer.strip() for answer in text.answers):
        problems.append("an answer is missing or empty")
    if text.task == "caption" and (text.question or len(text.answers) > 1):
        problems.append("a caption has no question and exactly one answer")
    if text.task == "qa" and not text.question.strip():
        problems.append("the question is empty")
    closed = choices.get(text.task)
    if closed is not None and text.answers and text.answers[0] not in closed:
        problems.append(f"the answer {text.answers[0]!r} is not one of the index's choices")
    return problems


def id_lines(media: Iterable[tuple[str, Sequence[Text]]]) -> str:
    """Return the content of `IDS_FILE` for keys and texts of the media of a folder."""
    return "".join(f"{key}#{text.id}\n" for key, texts in media for text in texts)


def texts_per_medium(media: Iterable[Sequence[Text]]) -> dict[str, list[int]]:
    """Return the least and the largest number of texts of each task that a medium has."""
    counts = [[sum(text.task == task for text in texts) for task in TASKS] for texts in media]
    columns = list(zip(*counts, strict=True)) or [(0,) for _ in TASKS]
    return {task: [min(column), max(column)] for task, column in zip(TASKS, columns, strict=True)}
