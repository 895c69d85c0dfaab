"""CIDEr of captions, as pycocoevalcap computes it (the variant known as CIDEr-D).

The inverse document frequencies come from the references of the evaluated set itself, so scores
compare only over the same references: the result carries their hash, and the tokenizer's name.
"""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer import ptbtokenizer

from mera_ds.errors import DataError, InputError, ResourceError
from mera_ds.evaluate.ptb import tokenize
from mera_ds.files import sha256_json
from mera_ds.log import logger

Tokenizer = Literal["auto", "ptb-java", "ptb-python", "raw"]
"""`raw` splits at spaces only, which is what the paper's CaptionMetrics library does."""

JAVA_TIMEOUT = 300.0
"""Seconds; 25 000 captions take one or two."""

_SEPARATOR = "x"


@dataclass(frozen=True)
class CiderResult:
    """CIDEr times 100, the scale of the paper's tables."""

    score: float
    per_id: dict[str, float]
    tokenizer: str
    """What was used: `ptb-java`, `ptb-python` or `raw`."""
    references_sha256: str


def cider(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenizer: Tokenizer = "auto",
) -> CiderResult:
    """Score one predicted caption an item against all the item's references.

    `auto` takes the Java tokenizer where Java works and its Python equivalent elsewhere.

    Raises:
        InputError: fewer than two items (every document frequency would be 1 and every score 0),
            or predictions and references are of different items.
        DataError: an item has no reference, or a reference has no words.
        ResourceError: `ptb-java` was asked for and Java does not work.
    """
    _check_ids(predictions, references)
    ids = sorted(references)
    captions = [predictions[key] for key in ids]
    owners = [key for key in ids for _ in references[key]]
    texts = captions + [text for key in ids for text in references[key]]
    tokenized, used = _tokenize(texts, tokenizer)

    tokenized_references: dict[str, list[str]] = {key: [] for key in ids}
    for key, text, original in zip(owners, tokenized[len(ids) :], texts[len(ids) :], strict=True):
        if not text.strip():
            raise DataError(f"a reference caption of {key!r} has no words: {original!r}; remove it")
        tokenized_references[key].append(text)
    tokenized_predictions = {
        key: [text] for key, text in zip(ids, tokenized[: len(ids)], strict=True)
    }

    score, scores = Cider().compute_score(tokenized_references, tokenized_predictions)
    return CiderResult(
        score=100 * float(score),
        per_id={key: 100 * float(value) for key, value in zip(ids, scores, strict=True)},
        tokenizer=used,
        references_sha256=sha256_json({key: list(references[key]) for key in ids}),
    )


def _check_ids(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    for what, keys in (
        ("prediction", references.keys() - predictions.keys()),
        ("reference", predictions.keys() - references.keys()),
    ):
        if keys:
            raise InputError(
                f"{len(keys)} items have no {what}, the first is {min(keys)!r}; CIDEr needs "
                "predictions and references of the same items"
            )
    if len(references) < 2:
        raise InputError(
            f"CIDEr needs at least 2 items and got {len(references)}: with one item no word is "
            "rarer than another and every score is 0; evaluate more samples"
        )
    for key, texts in references.items():
        if not texts:
            raise DataError(f"{key!r} has no reference caption; remove it from the test set")


def _tokenize(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[list[str], str]:
    """Return the texts as tokens joined by spaces, and the tokenizer's name."""
    if tokenizer == "raw":
        return list(texts), "raw"
    if tokenizer != "ptb-python":
        try:
            return java_tokens(texts), "ptb-java"
        except ResourceError as error:
            if tokenizer == "ptb-java":
                raise
            logger.info("CIDEr: %s; using the Python tokenizer", error)
    return [" ".join(tokenize(text)) for text in texts], "ptb-python"


def java_tokens(texts: Sequence[str]) -> list[str]:
    """Tokenise with pycocoevalcap's Java tokenizer and list of punctuation.

    Unlike pycocoevalcap's own call, this one writes no file, and a text's tokens do not depend on
    its neighbours: the tokenizer looks beyond line ends to tell an abbreviation from the end of a
    sentence, so a neutral line stands between texts.

    Raises:
        ResourceError: there is no Java, or it failed.
    """
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    lines = "".join(f"{' '.join(text.split())}\n{_SEPARATOR}\n" for text in texts)
    try:
        done = subprocess.run(
            [*command, "-preserveLines", "-lowerCase"],
            input=lines.encode(errors="replace"),
            capture_output=True,
            check=True,
            timeout=JAVA_TIMEOUT,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ResourceError(f"the Java tokenizer does not run ({error})") from None
    output = done.stdout.decode(errors="replace").split("\n")
    if len(output) != 2 * len(texts) + 1 or set(output[1::2]) - {_SEPARATOR}:
        raise ResourceError(f"the Java tokenizer returned {len(output)} lines for {2 * len(texts)}")
    dropped = set(ptbtokenizer.PUNCTUATIONS)
    return [
        " ".join(token for token in line.rstrip().split(" ") if token not in dropped)
        for line in output[:-1:2]
    ]
