"""A hundred thousand media with two million texts: bytes per text, and time to the first batch."""

import json
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mera_ds.batch import Sample
from mera_ds.data.dataset import ModalityData
from mera_ds.data.loader import LoaderSettings, MixturePart, StepLoader
from mera_ds.data.units import UnitRef
from mera_ds.shards.format import hash_keys
from mera_ds.shards.table import SampleInfo, TextInfo, table_of

MEDIA = 100_000
PER_TAR = 2000
BOUND = 150
"""Bytes per text of everything that stays in memory: index, units, lengths, order."""


def write_index(folder: Path) -> int:
    """Write an index without tars; return its number of texts."""
    folder.mkdir(parents=True)
    shards, keys, texts = [], [], 0
    for start in range(0, MEDIA, PER_TAR):
        samples = []
        for number in range(start, start + PER_TAR):
            count = 1 + number % 40
            texts += count
            keys.append(f"medium-{number:06d}")
            place = 1024 * (number - start)
            samples.append(
                {
                    "key": keys[-1],
                    "concept": f"concept {number}",
                    "media": ["jpg", place + 512, 100],
                    "json": [place + 612, 100],
                    "texts": [["caption", 20 + i] for i in range(count)],
                }
            )
        name = f"{start // PER_TAR:05d}.tar"
        size = 1024 * PER_TAR
        shards.append({"name": name, "bytes": size, "sha256": "0" * 64, "samples": samples})
        with (folder / name).open("wb") as file:
            file.truncate(size)
    infos: Sequence[Any] = [SampleInfo(key, "", "", 0, 0, 0, 0, ()) for key in keys]
    index = {
        **{"schema": 1, "dataset": "large", "split": "train", "modality": "image"},
        **{"licence": "CC0-1.0", "recipe": {}, "choices": {"qa": None}},
        "counts": {"samples": MEDIA, "texts": texts, "caption": texts, "qa": 0},
        "id_list_sha256": hash_keys(infos),
        "shards": shards,
    }
    (folder / "index.json").write_text(json.dumps(index))
    return texts


class Constant:
    """A reader without media, so that only the bookkeeping is measured."""

    def read(self, unit: UnitRef) -> Sample:
        return Sample("s", "image", (), (), (1,), torch.zeros(1), encoded=True)


def measure(folder: Path, texts: int, pipe: Any) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    started = time.process_time()
    data = ModalityData("image", [folder], "train")
    units = data.units(["caption"])
    reader: Any = Constant()
    part = MixturePart(reader, units, data.lengths(units), data.ids(units))
    settings = LoaderSettings(
        batch_size=64, epochs=1, max_steps=None, seed=0, rank=0, world=1, micro_batch=64, workers=0
    )
    loader = StepLoader({"image": part}, settings)
    next(loader.batches(loader.total_steps * 9 // 10))
    seconds = time.process_time() - started
    resident = process.memory_info().rss - before
    pipe.send((len(units) == texts, resident / texts, seconds))


@pytest.mark.slow
def test_two_million_texts(tmp_path: Path) -> None:
    texts = write_index(tmp_path / "train")
    parent, child = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=measure, args=(tmp_path, texts, child)
    )
    process.start()
    child.close()  # or nobody would hear of the end of a process that fails
    complete, per_text, seconds = parent.recv()
    process.join()
    assert complete
    assert per_text < BOUND, f"{per_text:.0f} bytes per text"
    assert seconds < 60, f"{seconds:.1f} s to the first batch"


def test_columns_need_few_bytes() -> None:
    texts = tuple(TextInfo("caption", 20) for _ in range(20))
    table = table_of(
        SampleInfo(f"k{n:06d}", f"c {n}", "jpg", 512, 100, 1024, 50, texts) for n in range(2000)
    )
    assert table.nbytes / (20 * len(table)) < 12
    assert table[7] == SampleInfo("k000007", "c 7", "jpg", 512, 100, 1024, 50, texts)
    assert table[-1].key == "k001999"
    assert [sample.key for sample in table[3:5]] == ["k000003", "k000004"]
    with pytest.raises(IndexError):
        table[2000]
