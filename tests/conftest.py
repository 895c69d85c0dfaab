"""What tests of every folder share: a cache of their own, and runs of the profile `tiny`."""

import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli.commands import readme_block, succeed, workplace

from mera_ds.config import load_profile, save_config
from mera_ds.methods import make_plan
from mera_ds.plan import save_plan

# Before any test module imports torch: many small tests gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MakeRun = Callable[..., Path]
SIGTERM_HANDLER = signal.getsignal(signal.SIGTERM)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have slow tests, so that two workers end at the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give this process and those it starts a fresh cache folder and one thread each."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERA_CACHE", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder


@pytest.fixture(autouse=True)
def not_launched() -> Iterator[None]:
    """Take away what a command that a test called in this process has set as its own launcher.

    Processes that later tests start would take this one's port for theirs.
    """
    yield
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """Fail a test that leaves another handler of SIGTERM: processes forked later inherit it."""
    yield
    assert signal.getsignal(signal.SIGTERM) == SIGTERM_HANDLER


@pytest.fixture(scope="session")
def tiny_template(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a fresh run of the profile `tiny`; don't change it, take a copy."""
    from mera_ds.cli import main

    folder = tmp_path_factory.mktemp("template") / "tiny"
    assert main(["init", str(folder), "--profile", "tiny"]) == 0
    return folder


@pytest.fixture(scope="session")
def make_tiny_run(tiny_template: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Return a function that makes a run of the profile `tiny` with overrides, in milliseconds.

    Data and backbone are copies of those that `mera-ds init` made once, so a test may damage them.
    """

    def make(*overrides: str) -> Path:
        config = load_profile("tiny", overrides)
        folder = tmp_path_factory.mktemp("runs") / "tiny"
        for name in ("data", "backbone"):
            shutil.copytree(tiny_template / name, folder / name)
        save_plan(make_plan(config), folder / "plan.json")
        save_config(config, folder / "config.yaml")
        return folder

    return make


@pytest.fixture(scope="session")
def finished_runs(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `runs/tiny/{expert,finetune,mera}`, finished by one `mera-ds run`."""
    folder = workplace(tmp_path_factory.mktemp("whole"))
    expert, mera, *_ = readme_block("mera-ds init runs/tiny/expert")
    for command in (expert, mera, expert.replace("expert", "finetune")):
        succeed(command, folder)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    succeed("mera-ds run runs/tiny/expert runs/tiny/finetune runs/tiny/mera", folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # One method is promised in two minutes on two cores; three took 95 s of one core.
    assert seconds < 240
    return folder
