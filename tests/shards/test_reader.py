"""Samples are read by position, from any process, and damage never passes as data."""

import multiprocessing
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import webdataset

from mera_ds.errors import DataError, InputError
from mera_ds.shards.format import parse_texts
from mera_ds.shards.reader import ShardReader

from .samples import COUNT, raw_sample, read_all, write


def test_every_sample_comes_back(folder: Path) -> None:
    with ShardReader(folder) as reader:
        assert len(reader) == COUNT
        for position in reversed(range(COUNT)):
            sample = raw_sample(position)
            record = reader.read_record(position)
            assert reader.read_media(position) == sample.media
            assert (record["id"], record["concept"]) == (sample.key, sample.concept)
            assert parse_texts(record, "here") == sample.texts
            assert reader.read_texts(position) == sample.texts


def test_webdataset_reads_the_tars(folder: Path) -> None:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    reader = ShardReader(folder)
    assert [sample["__key__"] for sample in samples] == [info.key for info in reader.samples]
    for position, sample in enumerate(samples):
        assert sample["json"] == reader.read_record(position)
        assert sample["bin"] == reader.read_media(position)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_an_open_reader(folder: Path, method: str) -> None:
    reader = ShardReader(folder)
    expected = read_all(reader)
    with multiprocessing.get_context(method).Pool(2) as pool:
        results = pool.map_async(read_all, [reader] * 4)
        assert read_all(reader) == expected
        assert results.get(timeout=60) == [expected] * 4


def test_threads_share_a_reader(folder: Path) -> None:
    reader = ShardReader(folder)
    with ThreadPoolExecutor(8) as pool:
        media = list(pool.map(reader.read_media, list(range(COUNT)) * 20))
    assert media == [raw_sample(number).media for number in range(COUNT)] * 20


def test_a_pickled_reader_carries_no_open_file(folder: Path) -> None:
    reader = ShardReader(folder)
    reader.read_media(0)
    copy = pickle.loads(pickle.dumps(reader))
    reader.close()
    assert copy.read_media(0) == raw_sample(0).media
    assert reader.read_media(0) == raw_sample(0).media, "a closed reader opens again"


def test_no_negative_or_far_position(folder: Path) -> None:
    reader = ShardReader(folder)
    for position in (-1, COUNT):
        with pytest.raises(IndexError):
            reader.read_media(position)


@pytest.mark.parametrize("change", [-1, -5000, 512])
def test_tar_of_another_size_is_refused_when_opened(folder: Path, change: int) -> None:
    path = folder / "00002.tar"
    size = path.stat().st_size
    content = path.read_bytes()
    path.write_bytes((content + bytes(max(change, 0)))[: size + change])
    reader = ShardReader(folder)
    assert reader.read_media(0) == raw_sample(0).media
    with pytest.raises(DataError, match=f"00002.tar has {size + change} bytes, expected {size}"):
        reader.read_media(4)


def test_tar_cut_while_it_is_open(folder: Path) -> None:
    reader = ShardReader(folder)
    reader.read_media(0)
    with (folder / "00000.tar").open("r+b") as file:
        file.truncate(3000)
    with pytest.raises(DataError, match="of 737 bytes could be read"):
        reader.read_media(1)


def test_missing_tar(folder: Path) -> None:
    (folder / "00001.tar").unlink()
    with pytest.raises(DataError, match=r"00001.tar is listed in the index but missing"):
        ShardReader(folder).read_media(2)


def test_record_of_another_sample_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    swapped = [raw_sample(1), raw_sample(0)]
    write(other, swapped)
    write(tmp_path / "two", [raw_sample(0), raw_sample(1)])
    index = (tmp_path / "two" / "index.json").read_text()
    (other / "index.json").write_text(index)
    reader = ShardReader(other)
    with pytest.raises(DataError):
        reader.read_record(0)


def test_changed_record_is_refused(folder: Path) -> None:
    reader = ShardReader(folder)
    info = reader.samples[0]
    tar = bytearray((folder / "00000.tar").read_bytes())
    payload = slice(info.json_offset, info.json_offset + info.json_size)

    tar[payload] = tar[payload].replace(b'"id":"n00"', b'"id":"n77"')
    (folder / "00000.tar").write_bytes(tar)
    with pytest.raises(DataError, match="has the id 'n77', expected 'n00'"):
        reader.read_record(0)

    tar[payload] = tar[payload].replace(b'"id":"n77"', b'"id":"n00"').replace(b'"q0"', b'"q0 ')
    (folder / "00000.tar").write_bytes(tar)
    with pytest.raises(DataError, match=r"n00.json is not valid JSON"):
        reader.read_record(0)


def test_texts_must_be_those_of_the_index(folder: Path) -> None:
    path = folder / "index.json"
    path.write_text(path.read_text().replace('["caption",19]', '["caption",18]', 1))
    with pytest.raises(DataError, match=r"n00.json: its texts are not those in the index"):
        ShardReader(folder).read_texts(0)


def test_incomplete_folder_is_refused(folder: Path) -> None:
    (folder / "index.json").unlink()
    with pytest.raises(InputError, match="not a complete shard folder"):
        ShardReader(folder)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="not a complete shard folder"):
        ShardReader(folder)
