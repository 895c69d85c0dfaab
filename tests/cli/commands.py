"""Commands as a user gives them: real processes, and the command lines that the README prints."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    command: str
    status: int
    output: str
    errors: str

    @property
    def message(self) -> str:
        """Return the error message, which must be the only one and not a traceback."""
        assert "Traceback" not in self.errors, self
        _, *messages = re.split(r"^error: ", self.errors, flags=re.MULTILINE)
        assert len(messages) == 1, self
        return messages[0].strip()

    def __str__(self) -> str:
        return f"{self.command} ended with {self.status}\n{self.output}\n{self.errors}"


def environment(**changes: str) -> dict[str, str]:
    """Return this process' variables with the tested commands on the path, and no accelerator."""
    # torchrun reads its port here; two test sessions on one machine must not take the same one.
    return {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PET_MASTER_PORT": str(20000 + os.getpid() % 9000),
        "CUDA_VISIBLE_DEVICES": "",
        **changes,
    }


def start(
    command: str, folder: Path, variables: Mapping[str, str] | None = None
) -> "subprocess.Popen[str]":
    """Start a command line in a folder, as the leader of its own process group.

    It hears Ctrl-C even if the tests were started in the background, where a shell has it ignored.
    """
    return subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        cwd=folder,
        env=environment(**(variables or {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: "subprocess.Popen[str]", command: str = "") -> Ended:
    """Wait for a started command; kill its group if it takes for ever."""
    try:
        output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
    return Ended(command or shlex.join(map(str, process.args)), process.returncode, output, errors)


def run(command: str, folder: Path, **variables: str) -> Ended:
    """Run a command line in a folder to its end."""
    return finish(start(command, folder, variables), command)


def succeed(command: str, folder: Path, **variables: str) -> Ended:
    """Run a command line that must succeed."""
    ended = run(command, folder, **variables)
    assert ended.status == 0, ended
    return ended


def workplace(folder: Path) -> Path:
    """Return a folder in which commands find what they find in the repository."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("launch", "examples"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


def wait_for(
    condition: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 120.0
) -> None:
    """Wait until something is true of what a running command has written."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None or condition(), finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def listing(folder: Path, without: Sequence[str] = ()) -> dict[str, bytes]:
    """Return every file below a folder with its content; some names don't count.

    The run's lock and TensorBoard's log are written by commands that refuse their work, too.
    """
    ignored = {".lock", "tensorboard", *without}
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not ignored.intersection(path.relative_to(folder).parts)
    }


def readme_blocks() -> list[list[str]]:
    """Return the commands of each shell block of the README, without their comments."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [
        [line.partition("  #")[0].strip() for line in block.splitlines() if line.strip()]
        for block in blocks
    ]


def readme_block(first: str) -> list[str]:
    """Return the README's block that begins with a command."""
    found = [block for block in readme_blocks() if block[0].startswith(first)]
    assert len(found) == 1, f"{len(found)} blocks of the README begin with {first!r}"
    return found[0]


def readme_inline() -> list[str]:
    """Return the commands in the README's running text."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    programs = ("mera-ds ", "torchrun ", "deepspeed ", "python ", "make ", "pip ")
    return [span for span in spans if span.startswith(programs)]
