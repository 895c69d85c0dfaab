"""The Python tokenizer equals pycocoevalcap's Java one."""

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from mera_ds.errors import ResourceError
from mera_ds.evaluate.cider import java_tokens
from mera_ds.evaluate.ptb import tokenize

from .sentences import sentences

# Sentences and their tokens as the Java tokenizer gives them.
GOLDEN = [
    json.loads(line)
    for line in (Path(__file__).parent / "ptb_golden.jsonl").read_text("utf-8").splitlines()
]
JAVA = shutil.which("java") is not None and (
    subprocess.run(["java", "-version"], capture_output=True).returncode == 0
)
needs_java = pytest.mark.skipif(not JAVA, reason="needs Java")


def random_sentences(count: int) -> list[str]:
    """Join words of the golden sentences, now and then with punctuation glued to them."""
    generator = random.Random(0)
    words = sorted({word for entry in GOLDEN[:140] for word in entry["text"].split()})
    marks = [*".,!?;:-\"'’“”()&/%", "...", "--", "—", "…"]
    sentences = []
    for _ in range(count):
        chosen = generator.choices(words, k=generator.randint(1, 12))
        glued = [
            word + generator.choice(marks) if generator.random() < 0.1 else word for word in chosen
        ]
        sentences.append(" ".join(glued))
    return sentences


def quoted() -> list[str]:
    """Return every pair of quotation marks between words."""
    marks = "'\"`‘’‚‛“”„‟‹›«»"
    return [f"a {one}{two}{end} cat" for one in marks for two in marks for end in ("", "s")]


def test_golden_sentences() -> None:
    assert len(GOLDEN) > 500
    different = [
        (entry["text"], entry["tokens"], " ".join(tokenize(entry["text"])))
        for entry in GOLDEN
        if " ".join(tokenize(entry["text"])) != entry["tokens"]
    ]
    assert different == []


@needs_java
def test_golden_sentences_are_what_java_gives() -> None:
    assert java_tokens([entry["text"] for entry in GOLDEN]) == [entry["tokens"] for entry in GOLDEN]


@needs_java
@pytest.mark.slow
def test_varied_sentences() -> None:
    texts = [*sentences(6000), *random_sentences(1500), *quoted()]
    assert len(set(texts)) > 7500
    pairs = zip(texts, java_tokens(texts), strict=True)
    assert [text for text, tokens in pairs if " ".join(tokenize(text)) != tokens] == []


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", []),
        ("...", []),
        ("A man's dog isn't here.", ["a", "man", "'s", "dog", "is", "n't", "here"]),
        ("one\ntwo\r\nthree\u2028four", ["one", "two", "three", "four"]),
        ("\ud800 lone surrogate", ["lone", "surrogate"]),
    ],
)
def test_tokens(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens


@needs_java
def test_java_gives_a_line_a_text_whatever_the_text() -> None:
    texts = ["", "one\ntwo", "a\u2028b\x0bc\x85d", "\ud800", "x", "no.", "5 cats", "plan B.", "The"]
    alone = [java_tokens([text])[0] for text in texts]
    assert java_tokens(texts) == alone
    assert alone[:4] == ["", "one two", "a b c d", ""]


@pytest.mark.parametrize("script", [None, "exit 1", "echo nonsense"])
def test_java_that_does_not_work_is_an_error(
    script: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        java = tmp_path / "java"
        java.write_text(f"#!/bin/sh\n{script}\n")
        java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if script else str(tmp_path))
    with pytest.raises(ResourceError, match="Java"):
        java_tokens(["a cat"])
