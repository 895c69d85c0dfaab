"""Every command that the README prints, as printed, with real processes and the profile `tiny`.

The blocks that compare two runs and two judges are executed in `tests/test_end_to_end.py`, that on
a modality of one's own in `tests/test_fifth_modality.py`, that on many nodes (but for ssh) in
`test_nodes.py` and `test_slurm.py`.
"""

import shlex
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from recipes.sources import write_okvqa
from torch import Tensor

from mera_ds.checkpoint import load_connector, load_delta, read_manifest
from mera_ds.config import load_config
from mera_ds.shards.lint import lint

from .commands import (
    REPOSITORY,
    Ended,
    readme_block,
    readme_blocks,
    readme_inline,
    run,
    succeed,
    workplace,
)

FIRST_SCREEN = "make demo"
LAUNCHERS = "deepspeed launch/stage.py"
INSTALL = "python3.11 -m venv"
STEPS = "mera-ds init --profile tiny"
TWO_RUNS = "mera-ds init runs/tiny/expert"
SHARDS = "mera-ds shards build tiny"
PUBLISHED = "mera-ds shards build okvqa"
MERGE = "python launch/merge.py --previous"
LINEAGE = "mera-ds lineage show"
OWN_MODALITY = "cp -r examples/imu"
JUDGES = "mera-ds judge-agreement"
PAPER = "mera-ds doctor --profile a6000-fp16"
ANOTHER_BACKBONE = "mera-ds init runs/qwen"
ANOTHER_ORDER = "mera-ds init runs/r1"
ZERO_3 = "torchrun --nproc-per-node 2 launch/stage.py"
NODES = "torchrun --nnodes 2"
ONE_MODALITY = (
    "mera-ds init --profile tiny order=[audio] align.max_steps=4 tune.max_steps=6 "
    "modalities.audio.connector.options.dropout=0.0"
)
"""A run whose first stage is the README's; dropout would differ with the number of ranks."""

ROUNDING = 1e-4
"""Largest difference of a weight between one rank and two; measured: 4e-6. Adam moves a weight by
up to 3e-3 in every one of the ten steps."""


def inline(first: str) -> str:
    """Return the command in the running text that begins so."""
    (found,) = [command for command in readme_inline() if command.startswith(first)]
    return found


def test_no_block_is_untested() -> None:
    first = (
        *(FIRST_SCREEN, LAUNCHERS, INSTALL, STEPS, TWO_RUNS, SHARDS, PUBLISHED),
        *(OWN_MODALITY, MERGE, PAPER, LINEAGE, NODES, JUDGES),
    )
    assert [block[0] for block in readme_blocks() if not block[0].startswith(first)] == []


def test_no_command_in_the_text_is_untested() -> None:
    """What is not executed here needs the network, or is named without its arguments."""
    executed = (ANOTHER_ORDER, ANOTHER_BACKBONE, ZERO_3)
    named = (
        "make ",
        "mera-ds plan",
        "mera-ds doctor",
        "mera-ds run RUN…",
        "mera-ds report RUN…",
        "mera-ds add",
        "mera-ds lineage reweight RUN --method NAME",
    )
    fetching = (
        "mera-ds pocket fetch",
        "mera-ds shards build pocket --source",
        "pip install -e '.[flash]'",
        "pip install -e '.[adam8bit]'",
    )
    elsewhere = (  # in test_shards.py, test_features.py, tests/{shards,methods,evaluate}
        "mera-ds study benchmarks/study.yaml",
        "mera-ds diagnose RUN",
        "mera-ds without-media RUN",
        "mera-ds shards features --run RUN",
        "torchrun --nproc-per-node 2 --no-python mera-ds shards features --run-folder RUN",
        "mera-ds shards lint --run RUN",
        "mera-ds shards lint DIR --quarantine",
    )
    measured = ("python benchmarks/merge.py", "python benchmarks/gpu.py")
    known = executed + named + fetching + elsewhere + measured
    assert [command for command in readme_inline() if not command.startswith(known)] == []


def test_the_targets_of_make_exist() -> None:
    commands = [*readme_block(FIRST_SCREEN)]
    commands += [command for command in readme_inline() if command.startswith("make ")]
    for command in commands:
        succeed(f"{command} --dry-run", REPOSITORY)


def test_what_the_install_block_names_exists() -> None:
    _, install = readme_block(INSTALL)
    words = shlex.split(install)
    assert words[:3] == ["pip", "install", "-c"]
    assert (REPOSITORY / words[3]).is_file()
    assert words[4:] == ["-e", "."]


@pytest.mark.parametrize("command", ["pocket fetch", "shards build"])
def test_commands_that_need_the_network_are_there(command: str, tmp_path: Path) -> None:
    assert "usage:" in succeed(f"mera-ds {command} --help", tmp_path).output


def test_shard_commands(tmp_path: Path) -> None:
    build, *rest = readme_block(SHARDS)
    succeed(build, tmp_path)
    for command in rest:
        succeed(command, tmp_path)
    assert lint(tmp_path / "build/tiny/audio/train") == []
    page = (tmp_path / "build/preview.html").read_text(encoding="utf-8")
    assert "image-red-square" in page


def test_published_dataset(tmp_path: Path) -> None:
    write_okvqa(tmp_path / "downloads/okvqa")
    for command in readme_block(PUBLISHED):
        succeed(command, tmp_path)
    assert lint(tmp_path / "data/okvqa/train") == []


def test_merging_two_folders(tiny_template: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    workplace(tmp_path)
    old = AutoModelForCausalLM.from_pretrained(tiny_template / "backbone")
    old.save_pretrained(tmp_path / "A")
    with torch.no_grad():
        for weight in old.parameters():
            weight += 3.0
    old.save_pretrained(tmp_path / "B")
    (command,) = readme_block(MERGE)
    succeed(command, tmp_path)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "A").state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "C").state_dict()
    assert merged.keys() == before.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, before[name] + 1.0)


@pytest.mark.slow
def test_overrides_when_a_run_is_made(tmp_path: Path) -> None:
    succeed(inline(ANOTHER_ORDER), tmp_path)
    plan = succeed("mera-ds plan runs/r1", tmp_path).output
    assert "pointcloud → audio → video → image" in plan.splitlines()[0]
    assert "1 % of pointcloud" in plan


@pytest.mark.slow
def test_the_papers_model_without_its_files(tmp_path: Path) -> None:
    """Weights and datasets are missing here, so every command must say so, and the plan stand."""
    variables = {
        "MERA_WEIGHTS": str(tmp_path / "weights"),
        "MERA_SHARDS": str(tmp_path / "shards"),
        "HOME": str(tmp_path),
    }
    doctor, build, init, plan, execute = readme_block(PAPER)
    checked = run(doctor, tmp_path, **variables)
    assert checked.status == 2
    assert "things are missing or wrong" in checked.message
    assert "meta-llama/Meta-Llama-3-8B-Instruct" in checked.output
    built = run(build, tmp_path, **variables)
    assert built.status == 2
    assert f"--source {tmp_path}/datasets/coco is not a folder" in built.message
    succeed(init, tmp_path, **variables)
    lines = succeed(plan, tmp_path, **variables).output.splitlines()
    assert len(lines) == 1 + 2 * (3 + 3 * 5) + 3
    assert "82000 samples, 641 steps" in lines[2]
    assert "files are missing: run 'mera-ds doctor runs/paper'" in lines[-1]
    refused = run(execute, tmp_path, **variables)
    assert refused.status == 2
    assert str(tmp_path / "weights/Meta-Llama-3-8B-Instruct") in refused.message
    succeed(inline(ANOTHER_BACKBONE), tmp_path, **variables)
    config = load_config(tmp_path / "runs/qwen")
    assert config.backbone.path == "~/models/qwen"


@pytest.mark.slow
class TestStepByStep:
    """The block "A run, step by step", line by line in one folder."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return workplace(tmp_path_factory.mktemp("steps"))

    @pytest.fixture(scope="class")
    def ended(self, folder: Path) -> Mapping[str, Ended]:
        return {command: succeed(command, folder) for command in readme_block(STEPS)}

    def test_the_plan_is_printed_before_anything_runs(self, ended: Mapping[str, Ended]) -> None:
        lines = ended["mera-ds plan"].output.splitlines()
        assert len(lines) == 1 + 2 * (3 + 3 * 5) + 2
        assert "04-pointcloud/realign" in lines[-6]

    def test_stages_by_hand_are_finished_for_run(self, ended: Mapping[str, Ended]) -> None:
        lines = ended["mera-ds run"].errors.splitlines()
        finished = [line for line in lines if line.endswith(": finished before")]
        assert len(finished) == 3 + 5 + 5
        assert finished[-1] == "default 03-audio/evaluate: finished before"

    def test_everything_is_done(self, ended: Mapping[str, Ended]) -> None:
        states = [line.split()[1:] for line in ended["mera-ds status"].output.splitlines()[1:]]
        assert states == [["done"]] * 18

    def test_changing_ones_mind_later(self, ended: Mapping[str, Ended], folder: Path) -> None:
        said = [succeed(command, folder).output for command in readme_block(LINEAGE)]
        assert "4  pointcloud" in said[0]
        assert "apply it: mera-ds lineage reweight" in said[1] or "as it stands, the" in said[1]
        mine = folder / "runs/default/stages/03-audio/reweighted-mine"
        assert [entry.coefficient for entry in read_manifest(mine).lineage] == ["1", "1/2", "1/2"]
        assert (mine.parent / "evaluation-reweighted-mine/scores.json").exists()
        assert "image, video, backbone" in said[4]
        assert (folder / "build/hf/model.safetensors").exists()
        assert "PEFT adapter of rank 16" in said[6]

    def test_the_report_shows_every_stage(self, ended: Mapping[str, Ended], folder: Path) -> None:
        text = ended["mera-ds report"].output
        for stage in ("1 image", "2 video", "3 audio", "4 pointcloud"):
            assert stage in text
        assert {path.name for path in (folder / "runs/default/report").iterdir()} == {
            *("report.md", "report.html", "tables.csv", "tables.tex", "provenance.csv"),
            *("scores.png", "scores.svg"),
        }


@pytest.mark.slow
class TestLaunchers:
    """One stage under each launcher, and under ZeRO-3, from the same start."""

    @pytest.fixture(scope="class")
    def folders(self, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
        """Return for each command the folder in which it was executed."""
        commands = [*readme_block(LAUNCHERS), inline(ZERO_3)]
        folders = {}
        for command in commands:
            folders[command] = workplace(tmp_path_factory.mktemp("launcher"))
            succeed(ONE_MODALITY, folders[command])
        one_rank = [command for command in commands if "torchrun" not in command]
        two_ranks = [command for command in commands if "torchrun" in command]

        def execute(group: list[str]) -> None:
            for command in group:
                succeed(command, folders[command])

        with ThreadPoolExecutor() as threads:
            list(threads.map(execute, (one_rank, two_ranks)))
        return folders

    def test_one_rank_gives_the_same_bytes(self, folders: Mapping[str, Path]) -> None:
        hashes = {
            read_manifest(model(folder)).model_sha256
            for command, folder in folders.items()
            if "torchrun" not in command
        }
        assert len(folders) == 4
        assert len(hashes) == 1

    def test_two_ranks_give_the_same_to_rounding(self, folders: Mapping[str, Path]) -> None:
        expected = tensors(folders["python launch/stage.py --modality audio"])
        for command, folder in folders.items():
            found = tensors(folder)
            assert found.keys() == expected.keys()
            for name, tensor in found.items():
                assert float((tensor - expected[name]).abs().max()) < ROUNDING, (command, name)


def model(folder: Path) -> Path:
    return folder / "runs/default/stages/01-audio/model"


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return what a stage has trained."""
    product = model(folder)
    manifest = read_manifest(product)
    (delta,) = manifest.lineage
    return load_delta(product, delta) | load_connector(product, manifest, "audio")
