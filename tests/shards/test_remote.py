"""Shard sets behind a real HTTP server that also fails, through a bounded cache."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mera_ds.data.dataset import ModalityData
from mera_ds.errors import DataError, InputError, ResourceError
from mera_ds.shards import remote
from mera_ds.shards.cache import TarCache
from mera_ds.shards.format import read_index
from mera_ds.shards.reader import Reading, ShardReader
from mera_ds.shards.remote import is_url, mirror

from .samples import COUNT, raw_sample

TAR = 10240
Fault = Callable[[str, bytes], tuple[int, bytes]]


class Server(ThreadingHTTPServer):
    """Serves a folder; `faults` are answers to the next requests of tars."""

    root: Path
    faults: list[Fault]
    ranges: list[str]
    requests: list[str]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.server.root / self.path.lstrip("/")
        self.server.requests.append(self.path)
        if not path.is_file():
            self.send_error(404)
            return
        content, status = path.read_bytes(), 200
        length = len(content)
        if start := self.headers.get("Range", ""):
            self.server.ranges.append(start)
            first = int(start.removeprefix("bytes=").rstrip("-"))
            content, status = content[first:], 206
            length = len(content)
        if self.server.faults and path.suffix == ".tar":
            fault_status, content = self.server.faults.pop(0)(self.path, content)
            status = fault_status or status
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{first + length - 1}/*")
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Stay quiet."""


def broken_server(path: str, content: bytes) -> tuple[int, bytes]:
    return 500, content


def truncated(path: str, content: bytes) -> tuple[int, bytes]:
    return 0, content[: len(content) // 2]


def wrong_bytes(path: str, content: bytes) -> tuple[int, bytes]:
    return 0, bytes(len(content))


@pytest.fixture
def server(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serve the folder of twelve samples; every test has a cache of its own."""
    monkeypatch.setenv("MERA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.01)
    remote._fetch_once.cache_clear()
    with Server(("127.0.0.1", 0), Handler) as server:
        server.root, server.faults, server.ranges, server.requests = folder.parents[1], [], [], []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/numbers"


def open_remote(server: Server, tars: float = 100) -> ShardReader:
    reading = Reading(verify=True, cache_bytes=int(tars * TAR))
    return ShardReader(mirror(url(server)) / "train", reading)


def read_all(reader: ShardReader) -> list[bytes]:
    return [reader.read_media(position) for position in range(len(reader))]


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "shards" / "tars").glob("*-*"))


EXPECTED = [raw_sample(number).media for number in range(COUNT)]


def test_samples_and_fingerprint_are_those_of_the_folder(server: Server, folder: Path) -> None:
    data = ModalityData("image", [mirror(url(server))], "train")
    assert data.fingerprint == [read_index(folder).fingerprint]
    assert read_all(data.readers[0]) == EXPECTED
    assert [text.id for text in data.readers[0].read_texts(3)] == ["c0", "q0"]
    before = len(server.requests)
    assert read_all(open_remote(server)) == EXPECTED
    assert len(server.requests) == before, "everything was cached"


@pytest.mark.parametrize("fault", [broken_server, truncated, wrong_bytes])
def test_a_failing_server_is_asked_again(server: Server, fault: Fault) -> None:
    server.faults = [fault, fault]
    assert read_all(open_remote(server)) == EXPECTED


def test_a_cut_download_is_continued(server: Server) -> None:
    server.faults = [truncated]
    assert open_remote(server).read_media(0) == EXPECTED[0]
    assert server.ranges == [f"bytes={TAR // 2}-"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(broken_server, "the server answers 500"), (wrong_bytes, "sha256 [0-9a-f]{64}, expected")],
)
def test_one_that_fails_always_is_an_error(
    server: Server, tmp_path: Path, fault: Fault, reason: str
) -> None:
    server.faults = [fault] * remote.ATTEMPTS
    with pytest.raises(DataError, match=rf"/numbers/train/00000\.tar could not .*{reason}"):
        open_remote(server).read_media(0)
    assert [path.suffix for path in cached(tmp_path)] == [".partial"]
    assert open_remote(server).read_media(0) == EXPECTED[0]


def test_the_cache_stays_within_its_limit(server: Server, tmp_path: Path) -> None:
    reader = open_remote(server, tars=2.5)
    for position, media in enumerate(EXPECTED):
        assert reader.read_media(position) == media
        assert sum(path.stat().st_size for path in cached(tmp_path)) <= 2.5 * TAR
    reader.read_media(8)
    oldest_kept = set(cached(tmp_path))
    reader.read_media(0)
    assert len(oldest_kept & set(cached(tmp_path))) == 1, "the least recently used one went"


def test_a_tar_in_use_is_not_removed(server: Server, tmp_path: Path) -> None:
    reader = open_remote(server, tars=1.5)
    tar = reader.index.shards[0]
    cache = TarCache(int(1.5 * TAR))
    descriptor = cache.open(f"{url(server)}/train/{tar.name}", tar.bytes, tar.sha256)
    try:
        (held,) = cached(tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mera_ds.shards.cache.PATIENCE_SECONDS", 0.1)
            with pytest.raises(ResourceError, match="all tars are in use"):
                reader.read_media(COUNT - 1)
        assert held.exists()
    finally:
        os.close(descriptor)
    assert reader.read_media(COUNT - 1) == EXPECTED[-1]
    assert not held.exists()


def test_a_tar_larger_than_the_cache_is_refused(server: Server) -> None:
    with pytest.raises(ResourceError, match="raise it"):
        open_remote(server, tars=0.5).read_media(0)


def test_processes_share_a_small_cache(server: Server, tmp_path: Path) -> None:
    reader = open_remote(server, tars=3)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(read_all, [reader] * 6, chunksize=1) == [EXPECTED] * 6
    assert sum(path.stat().st_size for path in cached(tmp_path)) <= 3 * TAR


def test_damage_in_the_cache_is_repaired(server: Server, tmp_path: Path) -> None:
    open_remote(server).read_media(0)
    (path,) = cached(tmp_path)
    path.write_bytes(bytes(TAR))
    assert open_remote(server).read_media(0) == EXPECTED[0]
    os.truncate(cached(tmp_path)[0], 99)
    assert open_remote(server).read_media(0) == EXPECTED[0]


def test_without_the_server_the_copy_from_before_serves(server: Server) -> None:
    read_all(open_remote(server))
    server.shutdown()
    server.server_close()
    remote._fetch_once.cache_clear()
    assert read_all(open_remote(server)) == EXPECTED


def test_a_missing_index_or_tar_is_named(server: Server, folder: Path) -> None:
    with pytest.raises(InputError, match=r"/numbers/test has no index\.json"):
        ShardReader(mirror(url(server)) / "test")
    reader = open_remote(server)
    (folder / "00005.tar").unlink()
    with pytest.raises(DataError, match=r"00005\.tar is listed in the index but missing"):
        reader.read_media(COUNT - 1)


def test_other_protocols_go_through_fsspec(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setenv("MERA_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/numbers/train", recursive=True)
    reader = ShardReader(mirror("memory://bucket/numbers") / "train", Reading(verify=True))
    assert read_all(reader) == EXPECTED


@pytest.mark.parametrize(
    "text",
    ["pipe:cat x", "pipe://cat x", "exec://ls", "simplecache::http://a/b", "http:/a", "htp://a/b"],
)
def test_commands_and_chains_are_refused(text: str) -> None:
    assert is_url(text)
    with pytest.raises(InputError, match="never run"):
        mirror(text)


def test_a_password_is_refused_and_not_repeated() -> None:
    with pytest.raises(InputError, match="holds a password") as caught:
        mirror("https://me:geheim@example.org/data")
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("text", ["{run}/data/image", "/data/image", "data", "~/a:b"])
def test_paths_are_no_urls(text: str) -> None:
    assert not is_url(text)
