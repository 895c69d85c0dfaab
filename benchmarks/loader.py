"""Loader against plain files and webdataset: samples per CPU second, wall time and memory.

`python benchmarks/loader.py` makes its data once (2 000 JPEGs, 200 clips with 40 captions each) and
writes `benchmarks/results/loader-<machine>.{json,md}`. All contenders read the same media, decode
them with the same function and yield equal samples (asserted before anything is timed). Each
measurement is a process of its own, forked from one that has only imported; repeats are interleaved
and the best of each is kept.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mera_ds.batch import Sample
from mera_ds.data.dataset import MediaCache, ModalityData, UnitRef
from mera_ds.data.loader import LoaderSettings, MixturePart, StepLoader
from mera_ds.machine import commit
from mera_ds.media import decode
from mera_ds.shards.format import Text
from mera_ds.shards.reader import ShardReader
from mera_ds.shards.writer import RawSample, write_shards

BATCH = 20
WORKERS = 2
CAPTIONS = 40
CACHE_BYTES = 512_000_000
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["mera_ds.data.loader", "mera_ds.media", "webdataset"])
GOALS = (
    ("read without decode, warm, samples per CPU s / webdataset", "ours/webdataset", 4.0),
    ("read without decode, cold, samples per s / plain files", "ours/plain", 2.0),
    ("images decoded, samples per CPU s / fastest other", "ours/best", 1.0),
    ("40 captions per clip, samples per s / plain", "ours/plain", 5.0),
    ("first batch: start of epoch / at 90 %", "start/late", 1 / 1.2),
)


def make_data(folder: Path, images: int, clips: int) -> None:
    """Write the media as plain files and as shards, unless an earlier call did."""
    for kind, count, make in (("image", images, _jpeg), ("video", clips, _clip)):
        extension = {"image": "jpg", "video": "mp4"}[kind]
        plain = folder / f"{kind}-plain"
        plain.mkdir(parents=True, exist_ok=True)
        samples = []
        for number in range(count):
            path = plain / f"{number:06d}.{extension}"
            if not path.exists():
                path.write_bytes(make(number))
            texts = tuple(
                Text(f"c{i}", "caption", "", (f"caption {i} of medium {number}",))
                for i in range(CAPTIONS if kind == "video" else 1)
            )
            key = f"m{number:06d}"
            samples.append(RawSample(key, extension, path.read_bytes(), key, key, texts))
            record = {"captions": [text.answers[0] for text in texts]}
            path.with_suffix(".json").write_text(json.dumps(record))
        write_shards(
            folder / kind / "train",
            kind,
            "train",
            kind,
            samples,
            "CC0-1.0",
            {"name": "bench"},
            shard_bytes=64 << 20,
        )


def _texture(number: int, height: int, width: int) -> np.ndarray:
    draw = np.random.default_rng(number)
    coarse = draw.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noise = draw.normal(0, 12, (height, width, 1))
    return (smooth + noise).clip(0, 255).astype(np.uint8)


def _jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_texture(number, 480, 640)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _clip(number: int) -> bytes:
    buffer = io.BytesIO()
    still = _texture(number, 360, 480)
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 480, 360, "yuv420p"
        for shift in range(48):
            frame = av.VideoFrame.from_ndarray(np.roll(still, 4 * shift, axis=1), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


def transform(kind: str, content: bytes) -> Tensor:
    """Decode and shrink a medium: (3, 224, 224) of an image, (4, 3, 224, 224) of a clip."""
    if kind == "image":
        return _pixels(decode("image", "jpg", content, "image"))
    frames = decode("video", "mp4", content, "clip")
    chosen = frames[np.linspace(0, len(frames) - 1, 4).astype(int)]
    return torch.stack([_pixels(Image.fromarray(frame)) for frame in chosen])


def _pixels(image: Image.Image) -> Tensor:
    small = np.array(image.resize((224, 224), Image.Resampling.BICUBIC))
    return torch.from_numpy(small).permute(2, 0, 1).float() / 255


class PlainFiles(Dataset[list[tuple[str, Tensor]]]):
    """Batches of (caption, medium) from files in a folder, as a torch tutorial would read them."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind = kind
        self.paths = sorted(folder.glob("*.mp4" if kind == "video" else "*.jpg"))
        texts = CAPTIONS if kind == "video" else 1
        units = [(path, text) for path in self.paths for text in range(texts)]
        order = torch.randperm(len(units), generator=torch.Generator().manual_seed(0))
        self.units = [units[place] for place in order.tolist()]

    def __len__(self) -> int:
        return len(self.units) // BATCH

    def __getitem__(self, step: int) -> list[tuple[str, Tensor]]:
        found = []
        for path, text in self.units[step * BATCH : (step + 1) * BATCH]:
            record = json.loads(path.with_suffix(".json").read_text())
            found.append((record["captions"][text], transform(self.kind, path.read_bytes())))
        return found


def plain(folder: Path, kind: str) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield the batches of the plain loader."""
    data = PlainFiles(folder / f"{kind}-plain", kind)
    yield from DataLoader(data, batch_size=None, num_workers=WORKERS)


def web(folder: Path, kind: str) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield the batches of webdataset's own pipeline; a clip is decoded once for its captions."""
    extension = {"image": "jpg", "video": "mp4"}[kind]

    def pairs(samples: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
        for sample in samples:
            media = transform(kind, sample[extension])
            for text in json.loads(sample["json"])["texts"]:
                yield text["answers"][0], media

    tars = [str(path) for path in sorted((folder / kind / "train").glob("*.tar"))]
    data = webdataset.WebDataset(tars, shardshuffle=len(tars), empty_check=False)
    pipeline = data.shuffle(500).compose(pairs).batched(BATCH, collation_fn=list)
    yield from webdataset.WebLoader(pipeline, batch_size=None, num_workers=WORKERS)


@dataclass(frozen=True)
class Reader:
    """Gives the loader a sample with its caption as name (the tokenizer isn't measured)."""

    data: ModalityData
    media: Callable[[UnitRef], Tensor]

    def read(self, unit: UnitRef) -> Sample:
        """Read one unit."""
        caption = self.data.text(unit).answers[0]
        return Sample(caption, self.data.modality, (), (), (), self.media(unit), encoded=False)


def steps(folder: Path, kind: str) -> StepLoader:
    """Return our loader on the shards of one kind."""
    data = ModalityData(kind, [folder / kind], "train")

    def load(unit: UnitRef) -> Tensor:
        return transform(kind, data.readers[unit.reader].read_media(unit.medium))

    units = data.units(["caption"])
    reader: Any = Reader(data, MediaCache(load, CACHE_BYTES) if data.media_return else load)
    part = MixturePart(reader, units, data.lengths(units), data.ids(units))
    settings = LoaderSettings(
        batch_size=BATCH,
        epochs=1,
        max_steps=None,
        seed=0,
        rank=0,
        world=1,
        micro_batch=BATCH,
        workers=WORKERS,
    )
    return StepLoader({kind: part}, settings)


def ours(folder: Path, kind: str) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield the batches of our loader."""
    for _, batches in steps(folder, kind).batches(0):
        yield [(sample.id, sample.media) for batch in batches for sample in batch.samples]


def read_plain(folder: Path) -> Iterator[int]:
    """Read media and texts of plain files, shuffled, in this process."""
    paths = sorted((folder / "image-plain").glob("*.jpg"))
    for place in np.random.default_rng(0).permutation(len(paths)):
        json.loads(paths[place].with_suffix(".json").read_text())
        yield len(paths[place].read_bytes())


def read_web(folder: Path) -> Iterator[int]:
    """Read them through webdataset, in this process."""
    tars = [str(path) for path in sorted((folder / "image" / "train").glob("*.tar"))]
    for sample in webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(500):
        json.loads(sample["json"])
        yield len(sample["jpg"])


def read_ours(folder: Path) -> Iterator[int]:
    """Read them through our reader: the tars in random order, their samples in random order."""
    draw = np.random.default_rng(0)
    with ShardReader(folder / "image" / "train") as reader:
        for number in draw.permutation(len(reader.index.shards)):
            for position in draw.permutation(reader.usable(number)).tolist():
                reader.read_record(position)
                yield len(reader.read_media(position))


LOADERS = {"plain": plain, "webdataset": web, "ours": ours}
READERS = {"plain": read_plain, "webdataset": read_web, "ours": read_ours}


def measure(task: str, name: str, folder: Path) -> dict[str, float]:
    """Time one pass in this process: samples/s, samples per CPU second, peak memory in MB."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the contenders' workers
    started, before = time.perf_counter(), _cpu()
    if task == "read":
        samples = sum(1 for _ in READERS[name](folder))
    elif task.startswith("first"):
        loader = steps(folder, "image")
        next(loader.batches(int(task.removeprefix("first-")) * loader.total_steps // 100))
        samples = 1
    else:
        samples = sum(len(batch) for batch in LOADERS[name](folder, task))
    wall = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()  # ru_maxrss counts the process that started us
    own = int(status.partition("VmHWM:")[2].split()[0])
    peak = max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    return {
        "wall": wall,
        "per_s": samples / wall,
        "per_cpu_s": samples / (_cpu() - before),
        "peak_mb": peak / 1e3,
        "samples": samples,
    }


def _cpu() -> float:
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def in_process(task: str, name: str, folder: Path, cold: bool = False) -> dict[str, float]:
    """Measure in a fresh process, its files dropped from the page cache first if `cold`.

    Otherwise all were read from end to end before: how they came into the cache, page by page or
    in large pieces, makes reading from it up to 1.5x faster.
    """
    for path in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        while not cold and os.read(descriptor, 1 << 20):
            pass
        os.close(descriptor)
    with ProcessPoolExecutor(1, mp_context=PROCESSES) as pool:
        return pool.submit(measure, task, name, folder).result()


def assert_equal(folder: Path) -> None:
    """Every contender yields the same captions with the same media."""
    for kind in ("image", "video"):
        found = {name: _contents(loader(folder, kind)) for name, loader in LOADERS.items()}
        assert found["plain"] == found["webdataset"] == found["ours"], kind
    sizes = {name: sorted(reader(folder)) for name, reader in READERS.items()}
    assert sizes["plain"] == sizes["webdataset"] == sizes["ours"]


def _contents(batches: Iterable[list[tuple[str, Tensor]]]) -> dict[str, str]:
    contents = {}
    for caption, media in (pair for batch in batches for pair in batch):
        assert caption not in contents, f"{caption} came twice"
        contents[caption] = hashlib.sha256(media.numpy().tobytes()).hexdigest()
    return contents


def best(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the best of each figure over the repeats."""
    least = ("wall", "peak_mb")
    return {key: (min if key in least else max)(row[key] for row in rows) for key in rows[0]}


def compare(folder: Path, repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Measure everything, contenders interleaved."""
    tasks = (("read", False), ("read", True), ("image", False), ("video", False))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for task, cold in tasks:
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in LOADERS}
        for _ in range(repeats + (4 if task == "read" else 0)):  # short
            for name, row in rows.items():
                row.append(in_process(task, name, folder, cold))
        found[f"{task}{', cold' if cold else ''}"] = {n: best(row) for n, row in rows.items()}
    first: dict[str, list[dict[str, float]]] = {"first-0": [], "first-90": []}
    for _ in range(repeats + 2):
        for task, row in first.items():
            row.append(in_process(task, "ours", folder))
    found["first batch"] = {name: best(row) for name, row in first.items()}
    return found


def ratios(found: dict[str, dict[str, dict[str, float]]]) -> list[float]:
    """Return the figures that `GOALS` speaks of, in its order."""
    read, cold, image, video = (found[k] for k in ("read", "read, cold", "image", "video"))
    others = max(image["plain"]["per_cpu_s"], image["webdataset"]["per_cpu_s"])
    first = found["first batch"]
    return [
        read["ours"]["per_cpu_s"] / read["webdataset"]["per_cpu_s"],
        cold["ours"]["per_s"] / cold["plain"]["per_s"],
        image["ours"]["per_cpu_s"] / others,
        video["ours"]["per_s"] / video["plain"]["per_s"],
        first["first-0"]["wall"] / first["first-90"]["wall"],
    ]


def table(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [f"{result['machine']}, commit {result['commit']}, {result['load']}", ""]
    lines += ["| figure | goal | measured |", "|---|---|---|"]
    for (what, _, goal), ratio in zip(GOALS, result["ratios"], strict=True):
        lines.append(f"| {what} | ≥ {goal:.2f} | {ratio:.2f} |")
    lines += ["", "| task | loader | samples/s | per CPU s | peak MB |", "|---|---|---|---|---|"]
    for task, rows in result["figures"].items():
        for name, row in rows.items():
            figures = f"{row['per_s']:.0f} | {row['per_cpu_s']:.0f} | {row['peak_mb']:.0f}"
            lines.append(f"| {task} | {name} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the data, compare, write and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "mera-loader")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    make_data(arguments.data, arguments.images, arguments.clips)
    assert_equal(arguments.data)
    load = f"load {os.getloadavg()[0]:.1f} at start"
    found = compare(arguments.data, arguments.repeats)
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 1e9:.0f} GB, torch {torch.__version__}, "
        f"webdataset {webdataset.__version__}",
        "commit": commit(),
        "load": load,
        "repeats": arguments.repeats,
        "images": arguments.images,
        "clips": arguments.clips,
        "ratios": ratios(found),
        "figures": found,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"loader-{platform.machine()}-{os.cpu_count()}cpu"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
