"""CIDEr: values, checks, and the choice of tokenizer."""

import math
from collections import Counter
from pathlib import Path

import pytest
from pycocoevalcap.tokenizer import ptbtokenizer

from mera_ds.errors import DataError, InputError, ResourceError
from mera_ds.evaluate.cider import cider
from mera_ds.files import sha256_json

REFERENCES = {
    "a": ["A man rides a red horse on the beach.", "a man riding a horse"],
    "b": ["Two dogs play with a ball in the park", "Dogs playing with the ball."],
    "c": ["A woman isn't happy with her phone", "the woman's phone is broken"],
    "d": ["A red bus drives down the street."],
}
PREDICTIONS = {
    "a": "A man is riding a horse on the beach.",
    "b": "two dogs are playing in the park",
    "c": "a woman holding a phone",
    "d": "a cat sleeps",
}


def cider_from_its_definition(
    predictions: dict[str, str], references: dict[str, list[str]]
) -> dict[str, float]:
    """CIDEr-D per item, times 100, from the formulas of specification and code."""

    def counts(text: str, n: int) -> Counter[tuple[str, ...]]:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    scores = {}
    for key in references:
        total = 0.0
        for n in range(1, 5):
            frequency = Counter(
                gram
                for texts in references.values()
                for gram in set().union(*(counts(text, n) for text in texts))
            )

            def weights(
                text: str, n: int = n, frequency: Counter[tuple[str, ...]] = frequency
            ) -> dict[tuple[str, ...], float]:
                return {
                    gram: count * (math.log(len(references)) - math.log(max(1, frequency[gram])))
                    for gram, count in counts(text, n).items()
                }

            guess = weights(predictions[key])
            for text in references[key]:
                truth = weights(text)
                dot = sum(min(w, truth.get(g, 0)) * truth.get(g, 0) for g, w in guess.items())
                norms = math.hypot(*guess.values()) * math.hypot(*truth.values())
                gap = counts(predictions[key], 2).total() - counts(text, 2).total()
                if norms:
                    total += dot / norms * math.exp(-(gap**2) / 72) / len(references[key])
        scores[key] = 10 * 100 * total / 4
    return scores


def test_raw_scores_follow_the_definition() -> None:
    result = cider(PREDICTIONS, REFERENCES, "raw")
    expected = cider_from_its_definition(PREDICTIONS, REFERENCES)
    assert result.per_id == pytest.approx(expected, abs=1e-9)
    assert result.score == pytest.approx(sum(expected.values()) / 4)
    assert result.tokenizer == "raw"
    assert result.per_id["d"] < result.per_id["a"]


def test_perfect_captions_score_a_thousand() -> None:
    # Each caption has n-grams of every length up to 4 that are not in all references.
    references = {"x": ["one two three four five"], "y": ["six seven eight nine ten"]}
    result = cider({key: texts[0] for key, texts in references.items()}, references, "raw")
    assert result.score == pytest.approx(1000)


def test_tokenizing_forgives_case_and_punctuation() -> None:
    raw = cider(PREDICTIONS, REFERENCES, "raw")
    tokenized = cider(PREDICTIONS, REFERENCES, "ptb-python")
    shouting = {key: f"{text.upper().rstrip('.')} !" for key, text in PREDICTIONS.items()}
    assert cider(shouting, REFERENCES, "ptb-python").per_id == tokenized.per_id
    assert tokenized.score > raw.score


def test_java_and_python_tokenizers_give_the_same_score() -> None:
    try:
        java = cider(PREDICTIONS, REFERENCES, "ptb-java")
    except ResourceError:
        pytest.skip("needs Java")
    python = cider(PREDICTIONS, REFERENCES, "ptb-python")
    assert java.per_id == python.per_id
    assert cider(PREDICTIONS, REFERENCES) == java
    library = ptbtokenizer.PTBTokenizer().tokenize(
        {key: [{"caption": text} for text in texts] for key, texts in REFERENCES.items()}
    )
    guesses = ptbtokenizer.PTBTokenizer().tokenize(
        {key: [{"caption": text}] for key, text in PREDICTIONS.items()}
    )
    raw = cider({key: texts[0] for key, texts in guesses.items()}, library, "raw")
    assert raw.per_id == java.per_id


def test_without_java_auto_takes_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jars = Path(ptbtokenizer.__file__).parent
    before = sorted(jars.iterdir())
    monkeypatch.setenv("PATH", str(tmp_path))
    result = cider(PREDICTIONS, REFERENCES)
    assert result == cider(PREDICTIONS, REFERENCES, "ptb-python")
    assert result.tokenizer == "ptb-python"
    with pytest.raises(ResourceError, match="Java"):
        cider(PREDICTIONS, REFERENCES, "ptb-java")
    assert sorted(jars.iterdir()) == before


def test_order_does_not_matter_and_references_are_named() -> None:
    turned = {key: REFERENCES[key] for key in reversed(REFERENCES)}
    result = cider(PREDICTIONS, REFERENCES, "ptb-python")
    assert cider(PREDICTIONS, turned, "ptb-python") == result
    assert result.references_sha256 == sha256_json(REFERENCES)
    other = {**REFERENCES, "a": REFERENCES["a"][:1]}
    assert cider(PREDICTIONS, other, "ptb-python").references_sha256 != result.references_sha256


def test_empty_prediction_scores_zero() -> None:
    result = cider({**PREDICTIONS, "a": ""}, REFERENCES, "ptb-python")
    assert result.per_id["a"] == 0.0


def test_one_item_is_refused() -> None:
    with pytest.raises(InputError, match="at least 2 items"):
        cider({"a": "a cat"}, {"a": ["a cat"]})


def test_different_items_are_refused() -> None:
    with pytest.raises(InputError, match="no prediction, the first is 'd'"):
        cider({key: PREDICTIONS[key] for key in "abc"}, REFERENCES)
    with pytest.raises(InputError, match="no reference, the first is 'e'"):
        cider({**PREDICTIONS, "e": "a cat"}, REFERENCES)


@pytest.mark.parametrize("texts", [[], [""], ["a cat", " ... !"]])
def test_missing_references_are_refused(texts: list[str]) -> None:
    with pytest.raises(DataError, match="'b'"):
        cider(PREDICTIONS, {**REFERENCES, "b": texts}, "ptb-python")
