"""Writes the shard set of `imu.yaml`: series that code draws, with captions and questions.

python make_shards.py [OUT]      default: `shards` beside this file

A concept is an activity and the side on which the device lies. A test concept is never trained on,
but its activity and its side are, in other pairs. The same bytes come out every time.
"""

import io
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mera_ds.shards.format import Text
from mera_ds.shards.writer import RawSample, write_shards

ACTIVITIES = ("resting", "walking", "shaking", "spinning")
SIDES = {"back": (0, 0, 1), "front": (0, 0, -1), "edge": (1, 0, 0), "foot": (0, 1, 0)}
COPIES = 4
RATE = 50
LENGTH = 128


def draw(activity: str, side: str, random: np.random.Generator) -> NDArray[np.float32]:
    """Return a series (128, 6): acceleration in g, rotation in rad/s, along x, y, z."""
    time = np.arange(LENGTH) / RATE
    down = np.array(SIDES[side], dtype=float)
    series = random.normal(scale=0.02, size=(LENGTH, 6))
    series[:, :3] += down
    phase = random.uniform(0, 2 * np.pi)
    if activity == "walking":
        step = np.sin(2 * np.pi * random.uniform(1.7, 2.2) * time + phase)
        series += 0.3 * step[:, None] * np.concatenate([down, [1, 1, 0]])
    elif activity == "shaking":
        shake = np.sin(2 * np.pi * random.uniform(6, 9) * time + phase)
        series[:, :3] += 1.5 * shake[:, None]
    elif activity == "spinning":
        series[:, 3:] += random.uniform(3, 5) * down
    return series.astype(np.float32)


def sample(activity: str, side: str, copy: int) -> RawSample:
    """Return one medium with its texts."""
    seed = (list(ACTIVITIES).index(activity), list(SIDES).index(side), copy)
    buffer = io.BytesIO()
    np.save(buffer, draw(activity, side, np.random.default_rng(seed)), allow_pickle=False)
    texts = (
        Text("c0", "caption", "", (f"a device {activity} on its {side}",)),
        Text("q0", "qa", "What is it doing?", (activity,)),
        Text("q1", "qa", "On which side is it?", (side,)),
    )
    return RawSample(
        key=f"imu-{activity}-{side}-{copy}",
        extension="npy",
        media=buffer.getvalue(),
        concept=f"{activity} {side}",
        source=f"drawn, copy {copy}",
        texts=texts,
    )


def main(out: Path) -> None:
    """Write `out/train` and `out/test`."""
    splits: dict[str, list[RawSample]] = {"train": [], "test": []}
    for a, activity in enumerate(ACTIVITIES):
        for b, side in enumerate(SIDES):
            split = "test" if a == b else "train"
            splits[split] += [sample(activity, side, copy) for copy in range(COPIES)]
    for split, samples in splits.items():
        index = write_shards(
            out / split,
            dataset="imu",
            split=split,
            modality="imu",
            samples=samples,
            licence="CC0-1.0",
            recipe={"name": "imu", "version": 1},
            choices={"qa": (*ACTIVITIES, *SIDES)},
        )
        print(f"{out / split}: {index.counts['samples']} media, {index.counts['texts']} texts")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "shards")
