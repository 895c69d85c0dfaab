"""Twelve small samples in six tars, for the tests; run as a script, it builds them.

`python samples.py FOLDER LOG` reads the samples one by one and adds each key to LOG.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mera_ds.shards.format import ShardIndex, Text
from mera_ds.shards.reader import ShardReader
from mera_ds.shards.writer import RawSample, SampleSource, write_shards

COUNT = 12
SHARD_BYTES = 6500
"""Two samples a tar."""
ANSWERS = ("even", "odd")


def raw_sample(number: int) -> RawSample:
    """Return sample `number`; sizes differ, so that padding matters."""
    return RawSample(
        key=f"n{number:02d}",
        extension="bin",
        media=bytes([number + 1]) * (700 + 37 * number),
        concept=f"number {number}",
        source=f"numbers/{number}",
        texts=(
            Text("c0", "caption", "", (f"the number {number}, naïve",)),
            Text("q0", "qa", "even or odd?", (ANSWERS[number % 2], "who knows")),
        ),
    )


def raw_samples() -> list[RawSample]:
    """Return all samples."""
    return [raw_sample(number) for number in range(COUNT)]


def write(
    folder: Path, samples: Sequence[SampleSource] | None = None, **changes: Any
) -> ShardIndex:
    """Write samples (default: all) as the split `numbers/train`."""
    options: dict[str, Any] = {
        "samples": raw_samples() if samples is None else samples,
        "dataset": "numbers",
        "split": "train",
        "modality": "image",
        "licence": "CC0-1.0",
        "recipe": {"name": "numbers", "version": 1},
        "choices": {"qa": ANSWERS},
        "shard_bytes": SHARD_BYTES,
    }
    return write_shards(folder, **(options | changes))


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder, by their path in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_all(reader: ShardReader) -> list[bytes]:
    """Read every medium many times; a function of this module, so that processes can call it."""
    return [reader.read_media(position) for position in range(len(reader)) for _ in range(50)]


def logged_samples(log: Path) -> list[Callable[[], RawSample]]:
    """Return functions that read the samples and add their keys to a log."""

    def read(number: int) -> RawSample:
        with log.open("a") as file:
            file.write(f"n{number:02d}\n")
        return raw_sample(number)

    return [partial(read, number) for number in range(COUNT)]


if __name__ == "__main__":
    write(Path(sys.argv[1]), logged_samples(Path(sys.argv[2])))
