"""How a command's process ends."""

import subprocess
import sys

LEAVE = "import atexit; from mera_ds.cli.launch import leave; {}leave(3)"


def ended(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_status_and_everything_printed_arrive() -> None:
    result = ended(LEAVE.format("print('said'); "))
    assert (result.returncode, result.stdout, result.stderr) == (3, "said\n", "")


def test_the_interpreter_is_not_taken_apart() -> None:
    result = ended(LEAVE.format("atexit.register(print, 'taken apart'); "))
    assert (result.returncode, result.stdout) == (3, "")


def test_nobody_who_listens_is_no_error() -> None:
    python = f"env -u PYTHONUNBUFFERED {sys.executable}"
    command = f'{python} -c "{LEAVE.format("print(1); ")}" | true; echo ${{PIPESTATUS[0]}}'
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("3\n", "")
