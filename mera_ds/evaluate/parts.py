"""What is said about one task, made in parts: by several ranks, and continued after a kill.

The items are cut into batches and these into parts before anyone starts, from the items alone. So
a batch holds the same items on any number of ranks, and the texts are the same. Each part is
written when it is complete; the next start generates the others. A rank generates its parts without
a collective operation: none waits for another before all are done.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mera_ds.distributed import World, gather, main_rank_first, share, together
from mera_ds.errors import DataError
from mera_ds.evaluate.predictions import Prediction, load_predictions, save_predictions
from mera_ds.files import failpoint
from mera_ds.log import logger

MOST_PARTS = 256
"""Per task; a part is at least one batch."""

Say = Callable[[Sequence[int]], list[str]]
"""Positions of the items of one batch -> what the model says about them."""


@dataclass(frozen=True)
class Generated:
    """What one call has generated."""

    texts: tuple[str, ...]
    """Of all ranks, without those that an earlier call had stored."""
    seconds: float
    """That this rank spent on it."""
    items: int
    """Of the whole task."""


@dataclass(frozen=True)
class Part:
    """Some batches of a task's items."""

    batches: tuple[tuple[int, ...], ...]
    """Positions of items."""

    @property
    def positions(self) -> tuple[int, ...]:
        """Return the positions of all items of the part."""
        return tuple(position for batch in self.batches for position in batch)


def cut_into_parts(lengths: Sequence[int], batch_size: int) -> list[Part]:
    """Put items of similar length into batches, and batches into at most `MOST_PARTS` parts."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = [
        tuple(order[start : start + batch_size]) for start in range(0, len(order), batch_size)
    ]
    size = -(-len(batches) // MOST_PARTS) or 1
    return [Part(tuple(batches[start : start + size])) for start in range(0, len(batches), size)]


def predict_in_parts(
    path: Path, asked: Sequence[Prediction], parts: Sequence[Part], say: Say, world: World
) -> Generated:
    """Write the predictions of one task, generating what no part file holds. Every rank calls it.

    Args:
        path: file of the predictions; the part files lie in a folder beside it.
        asked: the items in their order, their `prediction` empty.
        parts: from `cut_into_parts`, equal on all ranks.
        say: generates one batch, on this rank alone.
        world: this process among the ranks that share the work.
    """
    folder = path.with_suffix(".parts")
    files = [folder / f"{number:05d}.jsonl" for number in range(len(parts))]
    with main_rank_first(world) as mine:
        known = _known(files, parts, asked) if mine else {}
    todo = share([number for number in range(len(parts)) if number not in known])
    own = todo[world.rank :: world.size]
    started = time.monotonic()
    with together():
        made = _known([files[number] for number in own], [parts[n] for n in own], asked)
        said = {own[place]: predictions for place, predictions in made.items()}
        new = [number for number in own if number not in said]
        for number in new:
            said[number] = _generate(parts[number], asked, say)
            save_predictions(files[number], said[number])
            failpoint("evaluate.part")
    seconds = time.monotonic() - started
    everything = gather(said)
    texts = gather([entry.prediction for number in new for entry in said[number]])
    with main_rank_first(world) as mine:
        if mine:
            for of_rank in everything:
                known |= of_rank
            _join(path, parts, known)
            shutil.rmtree(folder, ignore_errors=True)
    return Generated(tuple(text for of_rank in texts for text in of_rank), seconds, len(asked))


def _generate(part: Part, asked: Sequence[Prediction], say: Say) -> list[Prediction]:
    return [
        replace(asked[position], prediction=text)
        for batch in part.batches
        for position, text in zip(batch, say(batch), strict=True)
    ]


def _known(
    files: Sequence[Path], parts: Sequence[Part], asked: Sequence[Prediction]
) -> dict[int, list[Prediction]]:
    """Return the parts, by place, whose files hold what is asked for."""
    found = {}
    for place, (file, part) in enumerate(zip(files, parts, strict=True)):
        if not file.exists():
            continue
        try:
            predictions = load_predictions(file)
        except DataError:
            predictions = []
        if [replace(p, prediction="") for p in predictions] == [asked[n] for n in part.positions]:
            found[place] = predictions
        else:
            logger.warning("%s does not hold the items of its part; generated again", file)
    return found


def _join(path: Path, parts: Sequence[Part], said: dict[int, list[Prediction]]) -> None:
    """Write all predictions in the order of the items."""
    ordered = {
        position: prediction
        for number, part in enumerate(parts)
        for position, prediction in zip(part.positions, said[number], strict=True)
    }
    save_predictions(path, [ordered[position] for position in range(len(ordered))])
