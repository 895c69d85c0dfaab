"""Model products: complete in themselves, checked when read, refused when anything differs."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mera_ds.checkpoint import (
    Manifest,
    NewDelta,
    check_lineage,
    hash_backbone,
    is_finished,
    load_connector,
    load_delta,
    load_tensors,
    read_manifest,
    remembered_sha256,
    require_tensors,
    save_tensors,
    write_product,
)
from mera_ds.errors import DataError, InputError, ResourceError

BASE = "b" * 64


def tensors(seed: int, *names: str) -> dict[str, Tensor]:
    """Return random tensors of some names."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, 2, generator=generator) for name in names or ("w", "b")}


def delta(stage: int, modality: str) -> NewDelta:
    """Return a delta of rank 1 on one layer."""
    generator = torch.Generator().manual_seed(stage)
    factors = {
        "layer.lora_A": torch.randn(1, 4, generator=generator),
        "layer.lora_B": torch.randn(4, 1, generator=generator),
    }
    return NewDelta(stage=stage, modality=modality, scale=2.0, rank=1, tensors=factors)


def write(folder: Path, previous: Path | None = None, **given: Any) -> Manifest:
    """Write a product of the backbone `BASE`."""
    facts = {"key": f"key of {folder.name}", "step": folder.name, "base_sha256": BASE}
    return write_product(folder, previous=previous, **{**facts, **given})


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """Return the products of two stages: connector and delta of image, then those of video."""
    folders = [tmp_path / "image", tmp_path / "video"]
    write(folders[0], connectors={"image": tensors(1)}, delta=delta(1, "image"))
    write(folders[1], folders[0], connectors={"video": tensors(2)}, delta=delta(2, "video"))
    return folders


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


class TestProducts:
    def test_everything_comes_back(self, chain: list[Path]) -> None:
        manifest = read_manifest(chain[1])
        assert set(manifest.connectors) == {"image", "video"}
        assert_equal(load_connector(chain[1], manifest, "image"), tensors(1))
        assert_equal(load_connector(chain[1], manifest, "video"), tensors(2))
        assert [(entry.stage, entry.modality) for entry in manifest.lineage] == [
            (1, "image"),
            (2, "video"),
        ]
        for entry in manifest.lineage:
            assert_equal(load_delta(chain[1], entry), delta(entry.stage, "").tensors)
            assert (entry.coefficient, entry.weight) == ("1", 2.0)
        assert manifest.provenance["software"]["torch"] == torch.__version__

    def test_a_delta_names_the_backbone_it_was_trained_on(self, chain: list[Path]) -> None:
        first, second = (read_manifest(folder) for folder in chain)
        assert second.lineage[1].parent == first.backbone_sha256
        assert first.backbone_sha256 != second.backbone_sha256 != BASE

    def test_a_product_needs_no_other(self, chain: list[Path]) -> None:
        shutil.rmtree(chain[0])
        manifest = read_manifest(chain[1])
        assert_equal(load_connector(chain[1], manifest, "image"), tensors(1))
        assert_equal(load_delta(chain[1], manifest.lineage[0]), delta(1, "").tensors)

    def test_what_did_not_change_is_not_stored_twice(self, chain: list[Path]) -> None:
        for name in ("connectors/image.safetensors", "deltas/01-image.safetensors"):
            assert (chain[0] / name).stat().st_ino == (chain[1] / name).stat().st_ino

    def test_a_new_connector_leaves_the_previous_product_as_it_was(
        self, chain: list[Path], tmp_path: Path
    ) -> None:
        manifest = write(tmp_path / "realigned", chain[1], connectors={"image": tensors(9)})
        assert_equal(load_connector(tmp_path / "realigned", manifest, "image"), tensors(9))
        assert_equal(load_connector(chain[1], read_manifest(chain[1]), "image"), tensors(1))
        assert manifest.backbone_sha256 == read_manifest(chain[1]).backbone_sha256
        assert manifest.model_sha256 != read_manifest(chain[1]).model_sha256

    def test_the_same_is_written_to_the_byte(self, chain: list[Path], tmp_path: Path) -> None:
        write(tmp_path / "b" / "image", connectors={"image": tensors(1)}, delta=delta(1, "image"))
        for path in sorted(entry for entry in chain[0].rglob("*") if entry.is_file()):
            again = tmp_path / "b" / "image" / path.relative_to(chain[0])
            assert again.read_bytes() == path.read_bytes()

    def test_tensors_of_any_layout_and_device_state_come_back(self, tmp_path: Path) -> None:
        given = torch.arange(6.0).view(2, 3).T.requires_grad_()
        found = load_tensors(tmp_path / "x", save_tensors(tmp_path / "x", {"w": given}))
        assert torch.equal(found["w"], given.detach())


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "nothing": ({}, "there is no tensor to save"),
    "empty": ({"w": torch.zeros(0, 3)}, "tensor 'w' is empty"),
    "nan": ({"a": torch.ones(2), "w": torch.tensor([1.0, float("nan")])}, "'w' is not finite"),
    "inf": ({"w": torch.tensor([float("-inf")], dtype=torch.float16)}, "'w' is not finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_training_should_give_is_not_written(
    name: str, chain: list[Path], tmp_path: Path
) -> None:
    bad, message = BAD[name]
    with pytest.raises(DataError, match=message):
        write(tmp_path / "bad", chain[1], connectors={"image": bad})
    factors = dataclasses.replace(delta(3, "audio"), tensors=bad)
    with pytest.raises(DataError, match=message):
        write(tmp_path / "bad", chain[1], delta=factors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image", "video"]


def test_a_disk_that_is_too_small_is_noticed_before_the_first_byte(tmp_path: Path) -> None:
    huge = torch.zeros(1).expand(10**14)
    with pytest.raises(ResourceError, match="big needs"):
        write(tmp_path / "big" / "big", connectors={"image": {"w": huge}})
    assert list(tmp_path.iterdir()) == []


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()  # a hard link: the other product keeps its copy
    path.write_bytes(content[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)


class TestDamage:
    @pytest.mark.parametrize("damage", [cut, flip])
    @pytest.mark.parametrize("file", ["connectors/image", "deltas/01-image"])
    def test_a_damaged_file_is_named(
        self, chain: list[Path], file: str, damage: Callable[[Path], None]
    ) -> None:
        manifest = read_manifest(chain[1])
        damage(chain[1] / f"{file}.safetensors")
        load = partial(load_connector, chain[1], manifest, "image")
        if file.startswith("deltas"):
            load = partial(load_delta, chain[1], manifest.lineage[0])
        with pytest.raises(DataError, match=rf"{file}\.safetensors was changed or damaged"):
            load()

    def test_a_missing_file_is_named(self, chain: list[Path]) -> None:
        (chain[1] / "connectors" / "video.safetensors").unlink()
        with pytest.raises(DataError, match=r"video\.safetensors is missing"):
            load_connector(chain[1], read_manifest(chain[1]), "video")

    def test_a_missing_connector_is_named(self, chain: list[Path]) -> None:
        with pytest.raises(DataError, match=r"image holds no connector for video"):
            load_connector(chain[0], read_manifest(chain[0]), "video")

    def test_what_is_no_safetensors_is_refused_without_a_hash_too(self, tmp_path: Path) -> None:
        save_file({"w": torch.ones(8)}, tmp_path / "x")
        cut(tmp_path / "x")
        with pytest.raises(DataError, match="can't be read as safetensors"):
            load_tensors(tmp_path / "x")

    def test_a_pickle_is_never_read(self, tmp_path: Path) -> None:
        torch.save({"w": torch.ones(2)}, tmp_path / "x.safetensors")
        with pytest.raises(DataError, match="can't be read as safetensors"):
            load_tensors(tmp_path / "x.safetensors")


class TestManifest:
    def test_an_unfinished_product_is_no_product(self, chain: list[Path]) -> None:
        (chain[0] / "manifest.json").unlink()
        with pytest.raises(InputError, match="image holds no finished model"):
            read_manifest(chain[0])

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"schema": 4}, DataError, "schema 4, expected 3"),
            ({"schema": None}, DataError, "schema None, expected 3"),
            ({"lineages": []}, InputError, "key 'lineages'.*did you mean 'lineage'"),
            ({"base_sha256": 5}, InputError, "base_sha256 is 5; expected str"),
            ({"lineage": [{}]}, InputError, r"lineage\[0\]: missing key 'file'"),
        ],
    )
    def test_a_foreign_manifest_is_refused(
        self, chain: list[Path], change: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        path = chain[0] / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(error, match=message):
            read_manifest(chain[0])

    def test_a_list_is_no_manifest(self, chain: list[Path]) -> None:
        (chain[0] / "manifest.json").write_text("[]")
        with pytest.raises(DataError, match=r"manifest\.json: schema None"):
            read_manifest(chain[0])

    def test_another_backbone_is_refused_with_both_hashes(self, chain: list[Path]) -> None:
        manifest = read_manifest(chain[1])
        check_lineage(chain[1], manifest, BASE)
        with pytest.raises(InputError, match=f"{'b' * 12}.*{'c' * 12}.*backbone.path"):
            check_lineage(chain[1], manifest, "c" * 64)


class TestIsFinished:
    def test_not_before_the_manifest_exists(self, chain: list[Path], tmp_path: Path) -> None:
        assert not is_finished(tmp_path / "nowhere", "any")
        (chain[0] / "manifest.json").unlink()
        assert not is_finished(chain[0], "key of image")

    def test_with_equal_inputs(self, chain: list[Path]) -> None:
        assert is_finished(chain[0], "key of image")

    def test_other_inputs_are_an_error_not_a_reason_to_train_again(self, chain: list[Path]) -> None:
        with pytest.raises(InputError, match="image was made from other data, settings or weights"):
            is_finished(chain[0], "another key")

    def test_an_unfinished_folder_is_replaced(self, chain: list[Path]) -> None:
        (chain[0] / "manifest.json").unlink()
        (chain[0] / "stale").write_text("")
        write(chain[0], connectors={"image": tensors(5)})
        assert is_finished(chain[0], "key of image")
        assert not (chain[0] / "stale").exists()


class TestRequireTensors:
    def test_equal_names_and_shapes_pass(self) -> None:
        require_tensors(tensors(1), tensors(2), "here")

    @pytest.mark.parametrize(
        ("found", "message"),
        [
            ({"w": torch.ones(3, 2)}, "missing 'b'"),
            ({**tensors(1), "x": torch.ones(1)}, "unexpected 'x'"),
            (
                {**tensors(1), "w": torch.ones(2, 3)},
                r"'w' has shape \(2, 3\), expected \(3, 2\)",
            ),
        ],
    )
    def test_any_difference_is_named(self, found: dict[str, Tensor], message: str) -> None:
        with pytest.raises(DataError, match=f"here does not fit the model: {message}"):
            require_tensors(found, tensors(1), "here")

    def test_all_are_counted_and_ten_are_listed(self) -> None:
        names = [f"t{number:02d}" for number in range(13)]
        with pytest.raises(DataError, match="'t09' and 3 more") as caught:
            require_tensors({}, tensors(1, *names), "here")
        assert "t10" not in str(caught.value)


class TestHashes:
    def test_a_backbone_is_its_configuration_and_weights(self, tmp_path: Path) -> None:
        folder, memory = tmp_path / "model", tmp_path / "hashes.json"
        with pytest.raises(InputError, match="model holds no HF checkpoint"):
            hash_backbone(folder, memory)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file({"w": torch.ones(2)}, folder / "model.safetensors")
        first = hash_backbone(folder, memory)
        (folder / "README.md").write_text("not part of the model")
        assert hash_backbone(folder, memory) == first
        save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
        second = hash_backbone(folder, memory)
        (folder / "config.json").write_text('{"a": 1}')
        assert len({first, second, hash_backbone(folder, memory)}) == 3

    def test_a_hash_is_remembered_until_the_file_changes(self, tmp_path: Path) -> None:
        memory = tmp_path / "hashes.json"
        (tmp_path / "x").write_text("old")
        first = remembered_sha256(tmp_path / "x", memory)
        (stamp,) = json.loads(memory.read_text())
        memory.write_text(json.dumps({stamp: "remembered"}))
        assert remembered_sha256(tmp_path / "x", memory) == "remembered"
        (tmp_path / "x").write_text("newer")
        assert remembered_sha256(tmp_path / "x", memory) not in (first, "remembered")

    def test_a_folder_is_all_its_files(self, tmp_path: Path) -> None:
        memory = tmp_path / "hashes.json"
        folder = tmp_path / "weights"
        folder.mkdir()
        seen = set()
        for name, content in (("a", "1"), ("b", "1"), ("b", "2")):
            (folder / name).write_text(content)
            seen.add(remembered_sha256(folder, memory))
        assert len(seen) == 3
