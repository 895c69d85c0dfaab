"""Writing files: nothing is half written, whatever happens; locks; full disks."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mera_ds.errors import InputError, LockedError, ResourceError
from mera_ds.files import (
    FAILPOINT_VARIABLE,
    TEMPORARY,
    add_to_json,
    committed_folder,
    folder_lock,
    full_disk_is_an_error,
    link_or_copy,
    read_json,
    remove_temporaries,
    require_space,
    require_unlocked,
    require_writable,
    sha256_file,
    sha256_json,
    write_bytes,
    write_json,
)

ROOT = Path(__file__).parents[1]


def contents(folder: Path) -> dict[str, str]:
    """Return all files below a folder, by their path in it."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def python(code: str, *arguments: object, failpoint: str = "") -> "subprocess.Popen[str]":
    """Start Python with the names of `mera_ds.files` imported."""
    environment = {**os.environ, FAILPOINT_VARIABLE: failpoint}
    start = "import sys; from pathlib import Path; from mera_ds.files import *\n"
    return subprocess.Popen(
        [sys.executable, "-c", start + code, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_the_lock(folder: Path) -> None:
    """Take a lock that is about to be released; fail if it is not."""
    deadline = time.monotonic() + 10
    while True:
        try:
            with folder_lock(folder):
                return
        except LockedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 256 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


class TestWrites:
    def test_json_comes_back(self, tmp_path: Path) -> None:
        value = {"a": [1, 2.5, None], "ü": "naïve\n\u2028"}
        write_json(tmp_path / "new" / "x.json", value)
        assert read_json(tmp_path / "new" / "x.json") == value

    def test_a_write_replaces_and_leaves_nothing_else(self, tmp_path: Path) -> None:
        write_bytes(tmp_path / "x", b"old")
        write_bytes(tmp_path / "x", b"new")
        assert contents(tmp_path) == {"x": "new"}

    def test_a_failed_write_leaves_the_old_file(self, tmp_path: Path) -> None:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "inside").write_text("kept")
        with pytest.raises(OSError, match="directory"):
            write_bytes(tmp_path / "x", b"new")
        assert contents(tmp_path) == {"x/inside": "kept"}

    @pytest.mark.parametrize("content", ["{", "\udcff", ""])
    def test_broken_json_is_named(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "broken.json"
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(InputError, match=r"broken\.json is not valid JSON"):
            read_json(path)

    def test_missing_json_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"gone\.json does not exist"):
            read_json(tmp_path / "gone.json")

    def test_hashes_are_those_of_the_content(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(b"abc")
        known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        assert sha256_file(tmp_path / "x") == known
        assert sha256_json({"b": 1, "a": [2, "é"]}) == sha256_json({"a": (2, "é"), "b": 1})
        assert sha256_json({"a": 1}) != sha256_json({"a": 2})

    def test_a_link_survives_the_loss_of_the_original(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("content")
        link_or_copy(tmp_path / "a", tmp_path / "new" / "b")
        assert (tmp_path / "new" / "b").stat().st_ino == (tmp_path / "a").stat().st_ino
        (tmp_path / "a").unlink()
        assert (tmp_path / "new" / "b").read_text() == "content"


class TestCommittedFolder:
    def test_it_appears_whole_at_the_end(self, tmp_path: Path) -> None:
        with committed_folder(tmp_path / "deep" / "final") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "x").write_text("x")
            assert not (tmp_path / "deep" / "final").exists()
        assert contents(tmp_path) == {"deep/final/sub/x": "x"}

    def test_it_replaces_the_old_one_as_a_whole(self, tmp_path: Path) -> None:
        for name in ("old", "new"):
            with committed_folder(tmp_path / "final") as folder:
                (folder / name).write_text(name)
        assert contents(tmp_path) == {"final/new": "new"}

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_an_error_leaves_the_old_one(self, tmp_path: Path, error: type[BaseException]) -> None:
        with committed_folder(tmp_path / "final") as folder:
            (folder / "old").write_text("old")
        with (  # noqa: PT012 - the error comes after the first file
            pytest.raises(error),
            committed_folder(tmp_path / "final") as folder,
        ):
            (folder / "new").write_text("new")
            raise error
        assert contents(tmp_path) == {"final/old": "old"}
        assert [path.name for path in tmp_path.iterdir()] == ["final"]

    WRITE = """
with committed_folder(Path(sys.argv[1])) as folder:
    (folder / "a").write_text(sys.argv[2])
    failpoint("test.inside")
    (folder / "b").write_text(sys.argv[2])
"""

    @pytest.mark.parametrize("existing", [False, True])
    @pytest.mark.parametrize(
        ("point", "committed"),
        [
            ("test.inside", False),
            ("commit.before_rename", False),
            ("commit.between_renames", False),
            ("commit.after_rename", True),
        ],
    )
    def test_kill_9_leaves_the_old_one_or_the_new_one(
        self, tmp_path: Path, point: str, committed: bool, existing: bool
    ) -> None:
        final = tmp_path / "final"
        old = {"final/a": "old", "final/b": "old"} if existing else {}
        if existing:
            assert python(self.WRITE, final, "old").wait() == 0
        killed = point != "commit.between_renames" or existing
        with python(self.WRITE, final, "new", failpoint=point) as process:
            assert process.wait() == (-signal.SIGKILL if killed else 0)
        remove_temporaries(tmp_path)
        new = {"final/a": "new", "final/b": "new"}
        assert contents(tmp_path) == (new if committed or not killed else old)
        with python(self.WRITE, final, "new") as process:
            assert process.wait() == 0
        assert contents(tmp_path) == new

    def test_a_failpoint_can_wait_for_the_nth_pass(self, tmp_path: Path) -> None:
        code = "for n in range(5):\n    print(n, flush=True)\n    failpoint('here')"
        with python(code, failpoint="here:3") as process:
            output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert output.split() == ["0", "1", "2"]


class TestRemoveTemporaries:
    def test_it_removes_what_killed_processes_left_and_nothing_else(self, tmp_path: Path) -> None:
        for name in (f"a/x{TEMPORARY}-12/inside", f"a/b/y.json{TEMPORARY}-7", "a/kept.partial"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("")
        removed = remove_temporaries(tmp_path)
        assert [path.name for path in removed] == [f"y.json{TEMPORARY}-7", f"x{TEMPORARY}-12"]
        assert contents(tmp_path) == {"a/kept.partial": ""}
        assert remove_temporaries(tmp_path) == []


class TestSharedPlaces:
    def test_entries_of_two_processes_are_all_kept(self, tmp_path: Path) -> None:
        code = "for n in range(20): add_to_json(Path(sys.argv[1]), {sys.argv[2] + str(n): n})"
        path = tmp_path / "notes.json"
        (tmp_path / f"notes.json{TEMPORARY}-7").write_text("{")
        first, second = (python(code, path, name) for name in "ab")
        assert (first.wait(), second.wait()) == (0, 0)
        assert read_json(path) == {f"{name}{n}": n for name in "ab" for n in range(20)}
        assert {entry.name for entry in tmp_path.iterdir()} == {"notes.json", "notes.json.lock"}
        add_to_json(path, {"a0": 7})
        assert read_json(path)["a0"] == 7


class TestFullDisk:
    def test_of_a_file(self, small_disk: Path) -> None:
        write_bytes(small_disk / "x", b"old")
        with pytest.raises(ResourceError, match=r"disk is full.*/x was not written"):
            write_bytes(small_disk / "x", b"n" * 500_000)
        assert contents(small_disk) == {"x": "old"}

    def test_of_a_folder(self, small_disk: Path) -> None:
        with committed_folder(small_disk / "final") as folder:
            (folder / "x").write_text("old")
        with (
            pytest.raises(ResourceError, match=r"disk is full.*/final was not written"),
            committed_folder(small_disk / "final") as folder,
        ):
            (folder / "x").write_bytes(b"n" * 500_000)
        assert contents(small_disk) == {"final/x": "old"}

    def test_of_tensors(self, small_disk: Path) -> None:
        import torch

        from mera_ds.checkpoint import save_tensors

        with (
            pytest.raises(ResourceError, match=r"disk is full.*/final was not written"),
            committed_folder(small_disk / "final") as folder,
        ):
            save_tensors(folder / "x.safetensors", {"x": torch.zeros(500_000)})
        assert contents(small_disk) == {}

    def test_other_errors_pass_through(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError), full_disk_is_an_error(tmp_path):
            (tmp_path / "gone").read_text()

    def test_a_disk_that_is_only_read(self, small_disk: Path) -> None:
        require_writable(small_disk / "not" / "there")
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        with pytest.raises(InputError, match=r"disk can't be written to .* a read-only disk"):
            require_writable(small_disk / "not" / "there")

    def test_space_is_asked_for_before_it_is_needed(self, tmp_path: Path) -> None:
        require_space(tmp_path / "not" / "there", 1000)
        with pytest.raises(ResourceError, match=r"not/there needs \d+\.\d MB"):
            require_space(tmp_path / "not" / "there", 10**24)


class TestLock:
    @pytest.fixture
    def holder(self, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
        """Start a process that holds the lock of `tmp_path`."""
        code = "import time\nwith folder_lock(Path(sys.argv[1])):\n"
        code += "    print('held', flush=True)\n    time.sleep(60)"
        with python(code, tmp_path) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
            process.kill()

    def test_a_second_process_is_refused_at_once(
        self, tmp_path: Path, holder: "subprocess.Popen[str]"
    ) -> None:
        before = contents(tmp_path)
        started = time.monotonic()
        with (
            pytest.raises(LockedError, match=f"in use by process {holder.pid}"),
            folder_lock(tmp_path),
        ):
            pytest.fail("two processes hold the lock")
        with pytest.raises(LockedError, match=f"in use by process {holder.pid}"):
            require_unlocked(tmp_path)
        assert time.monotonic() - started < 10
        assert contents(tmp_path) == before

    def test_kill_9_releases_it(self, tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
        holder.kill()
        holder.wait()
        with folder_lock(tmp_path):
            assert (tmp_path / ".lock").read_text() == str(os.getpid())

    def test_a_program_that_works_for_a_killed_process_keeps_it(self, tmp_path: Path) -> None:
        code = "import subprocess\nwith folder_lock(Path(sys.argv[1])):\n"
        code += "    child = subprocess.Popen(['sleep', '60'], close_fds=False)\n"
        code += "    print(child.pid, flush=True)\n    child.wait()"
        with python(code, tmp_path) as process:
            assert process.stdout is not None
            worker = int(process.stdout.readline())
            process.kill()
        with pytest.raises(LockedError), folder_lock(tmp_path):
            pytest.fail("the program still works on the folder")
        os.kill(worker, signal.SIGKILL)
        wait_for_the_lock(tmp_path)

    def test_a_forked_helper_does_not_keep_it(self, tmp_path: Path) -> None:
        code = "import multiprocessing, time\nwith folder_lock(Path(sys.argv[1])):\n"
        code += "    fork = multiprocessing.get_context('fork')\n"
        code += "    child = fork.Process(target=time.sleep, args=(60,))\n    child.start()\n"
        code += "    print(child.pid, flush=True)\n    child.join()"
        with python(code, tmp_path) as process:
            assert process.stdout is not None
            helper = int(process.stdout.readline())
            with pytest.raises(LockedError), folder_lock(tmp_path):
                pytest.fail("the process still works on the folder")
            process.kill()
            process.stdout.close()
        wait_for_the_lock(tmp_path)
        os.kill(helper, signal.SIGKILL)

    def test_it_is_released_at_the_end_and_after_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="inside"), folder_lock(tmp_path):
            raise ValueError("inside")
        require_unlocked(tmp_path)
        require_unlocked(tmp_path / "nowhere")
        with folder_lock(tmp_path):
            pass
        assert python("with folder_lock(Path(sys.argv[1])): pass", tmp_path).wait() == 0
