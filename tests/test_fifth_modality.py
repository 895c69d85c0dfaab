"""A user's own modality, learned as stage 5 of a finished run with the commands of the README."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from cli.commands import Ended, readme_block, run, succeed, workplace

from mera_ds.checkpoint import read_manifest
from mera_ds.files import sha256_file

pytestmark = pytest.mark.slow

ORDER = ("image", "video", "audio", "pointcloud", "imu")
RUN = Path("runs/default")


def stages(folder: Path) -> dict[str, tuple[int, str]]:
    """Return the time of change and the hash of every file of the first four stages."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, sha256_file(path))
        for path in sorted((folder / RUN / "stages").glob("0[1-4]-*/**/*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def four(finished_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a finished four-stage run."""
    folder = workplace(tmp_path_factory.mktemp("fifth"))
    shutil.copytree(finished_runs / "runs/tiny/mera", folder / RUN)
    return folder


@pytest.fixture(scope="module")
def before(four: Path) -> Mapping[str, tuple[int, str]]:
    return stages(four)


@pytest.fixture(scope="module")
def ended(four: Path, before: Mapping[str, tuple[int, str]]) -> Mapping[str, Ended]:
    """Execute the README's block, line by line; keep a copy of the run before it learns."""
    found = {}
    for command in readme_block("cp -r examples/imu"):
        found[command] = succeed(command, four)
        if command.startswith("mera-ds add"):
            shutil.copytree(four / RUN, four / "runs/added")
    return found


def test_the_fifth_delta_is_weighted_by_a_fifth(four: Path, ended: Mapping[str, Ended]) -> None:
    manifest = read_manifest(four / RUN / "stages/05-imu/model")
    found = [(entry.stage, entry.modality, entry.coefficient) for entry in manifest.lineage]
    fractions = ("1", "1/2", "1/3", "1/4", "1/5")
    assert found == list(zip(range(1, 6), ORDER, fractions, strict=True))
    assert set(manifest.connectors) == set(ORDER)
    last = read_manifest(four / RUN / "stages/04-pointcloud/model")
    assert manifest.lineage[-1].parent == last.backbone_sha256


def test_earlier_stages_are_untouched(
    four: Path, before: Mapping[str, tuple[int, str]], ended: Mapping[str, Ended]
) -> None:
    lines = ended["mera-ds run"].errors.splitlines()
    finished = [line.split()[1] for line in lines if line.endswith(": finished before")]
    assert len(finished) == 3 + 3 * 5 + 2
    assert finished[-2:] == ["05-imu/align:", "05-imu/tune:"]
    assert len(before) > 50
    assert stages(four) == before


def test_all_five_are_evaluated(four: Path, ended: Mapping[str, Ended]) -> None:
    lines = (four / RUN / "results.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["stage"] == 5]
    found = {(row["modality"], row["task"]): row["count"] for row in rows}
    assert found.keys() == {(name, task) for name in ORDER for task in ("caption", "qa")}
    assert found["imu", "caption"] == 16
    assert found["imu", "qa"] == 32
    text = ended["mera-ds report"].output
    assert "5 imu" in text
    assert "5 of 5" in text


def test_the_run_has_a_copy_of_the_plugin(four: Path, ended: Mapping[str, Ended]) -> None:
    copy = four / RUN / "plugins/imu.py"
    assert copy.read_bytes() == (four / "my_imu/imu.py").read_bytes()
    plugins = read_manifest(four / RUN / "stages/05-imu/model").provenance["plugins"]
    assert plugins == {"imu.py": sha256_file(copy)}
    assert read_manifest(four / RUN / "stages/04-pointcloud/model").provenance["plugins"] == {}


def test_two_ranks_and_loader_processes(four: Path, ended: Mapping[str, Ended]) -> None:
    succeed(
        "torchrun --nproc-per-node 2 launch/stage.py --run-folder runs/added --modality imu "
        "--step 05-imu/align execution.workers=1 execution.features=online",
        four,
    )
    found, expected = (
        read_manifest(four / f"runs/{name}/stages/05-imu/aligned") for name in ("added", "default")
    )
    assert found.key == expected.key


def test_a_changed_plugin_is_refused(four: Path, ended: Mapping[str, Ended]) -> None:
    copy = four / RUN / "plugins/imu.py"
    content = copy.read_bytes()
    copy.write_bytes(content + b"# another version\n")
    try:
        refused = run("mera-ds run", four)
        states = succeed("mera-ds status", four).output.splitlines()
    finally:
        copy.write_bytes(content)
    assert refused.status == 2
    assert "the run's plugin plugins/imu.py was changed after" in refused.message
    assert [line.split()[1] for line in states[1:19]] == ["done"] * 18
    assert "05-imu/align" in states[19]
    assert "stale: the run's plugin plugins/imu.py was changed" in states[19]
