"""Damage is never silent: each of a thousand mutations is named, or changes no sample."""

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from mera_ds.data.dataset import ModalityData
from mera_ds.errors import DataError, InputError
from mera_ds.files import sha256_json
from mera_ds.shards import verify
from mera_ds.shards.damage import quarantine_folder
from mera_ds.shards.format import index_json, read_index
from mera_ds.shards.quarantine import QUARANTINE_NAME
from mera_ds.shards.reader import Reading, ShardReader

from .samples import COUNT, write

MUTATIONS = 1000
Content = dict[str, tuple[bytes, Any]]


def read(folder: Path, verify: bool = True) -> Content:
    """Return medium and texts of every usable sample, by key."""
    with ShardReader(folder, Reading(verify=verify)) as reader:
        return {
            reader.samples.key(position): (
                reader.read_media(position),
                reader.read_texts(position),
            )
            for position in reader.index.usable.tolist()
        }


def read_or_complaint(folder: Path) -> Content | str:
    try:
        return read(folder)
    except DataError as error:
        return str(error)


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Cut, or change one byte."""
    place = draw.randrange(len(content))
    if draw.random() < 0.3:
        return content[:place]
    changed = bytearray(content)
    changed[place] ^= draw.randrange(1, 256)
    return bytes(changed)


@pytest.mark.slow
def test_a_thousand_mutations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    draw = random.Random(0)
    names = sorted(path.name for path in folder.iterdir())
    sound = read(folder)
    outcomes = {"detected": 0, "harmless": 0, "quarantined": 0, "kept": 0}
    for _ in range(MUTATIONS):
        path = folder / draw.choice([*names, "index.json"])
        before = path.read_bytes()
        path.write_bytes(mutate(before, draw))
        found = read_or_complaint(folder)
        if isinstance(found, str):
            assert any(name in found for name in names), found
            outcomes["detected"] += 1
        else:
            assert found == sound, f"{path.name} gave other samples in silence"
            outcomes["harmless"] += 1
        if path.suffix == ".tar":
            quarantine = quarantine_folder(folder)
            kept = read(folder)
            assert kept.items() <= sound.items()
            assert len(kept) + len(quarantine.samples) == COUNT
            outcomes["kept"] += len(kept)
            outcomes["quarantined"] += len(quarantine.samples)
            (folder / QUARANTINE_NAME).unlink(missing_ok=True)
        path.write_bytes(before)
    assert outcomes["detected"] + outcomes["harmless"] == MUTATIONS
    assert outcomes["detected"] > 0.9 * MUTATIONS
    assert outcomes["harmless"] < 0.1 * MUTATIONS
    assert outcomes["kept"] > outcomes["quarantined"] > 0


def test_an_offset_that_leads_elsewhere_is_noticed_without_any_hash(folder: Path) -> None:
    path = folder / "index.json"
    index = json.loads(path.read_text())
    index["shards"][0]["samples"][0]["media"][1] += 512
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"00000\.tar: n00\.bin \(700 bytes\) does not lie at 1024"):
        read(folder, verify=False)


def test_a_settled_tar_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in folder.glob("*.tar"):
        os.utime(path, (time.time() - 60,) * 2)
    read(folder)
    monkeypatch.setattr(verify.hashlib, "file_digest", None)
    read(folder)
    (folder / "00003.tar").touch()
    with pytest.raises(TypeError):
        read(folder)


class TestQuarantine:
    def test_of_a_cut_tar_only_the_lost_samples_are_left_out(self, folder: Path) -> None:
        before = read_index(folder).fingerprint
        tar = folder / "00002.tar"
        os.truncate(tar, 4000)
        with pytest.raises(DataError, match=r"00002\.tar has 4000 bytes"):
            ModalityData("image", [folder.parent], "train")
        quarantine_folder(folder)
        data = ModalityData("image", [folder.parent], "train")
        ids = [data.unit_id(unit) for unit in data.units(["caption"])]
        assert ids == [f"numbers/n{number:02d}#0" for number in range(COUNT) if number != 5]
        assert data.fingerprint != [before]
        assert data.readers[0].index.usable_counts["samples"] == COUNT - 1
        with pytest.raises(DataError, match="n05 is in quarantine"):
            data.readers[0].read_media(5)
        assert data.readers[0].place(6) == (3, 0)

    def test_a_medium_that_cannot_be_decoded_is_left_out(self, folder: Path) -> None:
        def decode(extension: str, content: bytes, name: str) -> None:
            if content[0] == 8:
                raise DataError(f"{name}: broken")

        assert set(quarantine_folder(folder, decode).samples) == {"n07"}
        assert set(read(folder)) == {f"n{n:02d}" for n in range(COUNT) if n != 7}

    def test_further_damage_is_noticed(self, folder: Path) -> None:
        os.truncate(folder / "00002.tar", 4000)
        quarantine_folder(folder)
        (folder / "00002.tar").write_bytes(bytes(4000))
        with pytest.raises(DataError, match=r"00002\.tar: .* of the quarantine"):
            read(folder)

    def test_a_tar_that_came_back_asks_for_a_new_quarantine(self, folder: Path) -> None:
        whole = (folder / "00002.tar").read_bytes()
        os.truncate(folder / "00002.tar", 4000)
        quarantine_folder(folder)
        (folder / "00002.tar").write_bytes(whole)
        message = r"its quarantine says 4000: .*; delete quarantine\.json, or renew it"
        with pytest.raises(DataError, match=message):
            ModalityData("image", [folder.parent], "train")
        with pytest.raises(DataError, match=r"by its quarantine; delete quarantine\.json"):
            ShardReader(folder).read_media(4)

    @pytest.mark.parametrize("repaired", [False, True])
    def test_a_rebuild_ends_it(self, folder: Path, repaired: bool) -> None:
        before, whole = read(folder), (folder / "00002.tar").read_bytes()
        os.truncate(folder / "00002.tar", 4000)
        quarantine_folder(folder)
        if repaired:
            (folder / "00002.tar").write_bytes(whole)
        assert write(folder).quarantine is None
        assert not (folder / QUARANTINE_NAME).exists()
        assert len(ModalityData("image", [folder.parent], "train").units(["caption"])) == COUNT
        assert read(folder) == before

    def test_building_again_keeps_that_of_sound_tars(self, folder: Path) -> None:
        def decode(extension: str, content: bytes, name: str) -> None:
            if content[0] == 8:
                raise DataError(f"{name}: broken")

        quarantine = quarantine_folder(folder, decode)
        assert write(folder).quarantine == quarantine

    def test_a_sound_folder_has_none(self, folder: Path) -> None:
        assert quarantine_folder(folder).samples == {}
        assert not (folder / QUARANTINE_NAME).exists()

    def test_that_of_another_index_is_refused(self, folder: Path, tmp_path: Path) -> None:
        (folder / "00000.tar").unlink()
        quarantine_folder(folder)
        write(tmp_path / "other", licence="other")
        (folder / QUARANTINE_NAME).rename(tmp_path / "other" / QUARANTINE_NAME)
        with pytest.raises(DataError, match="belongs to another index"):
            read_index(tmp_path / "other")

    def test_a_broken_one_is_named(self, folder: Path) -> None:
        (folder / QUARANTINE_NAME).write_text('{"schema": 2, "index": "0"}')
        with pytest.raises(DataError, match=r"quarantine\.json: schema 2, expected 1"):
            read_index(folder)

    def test_without_an_index_nothing_can_be_said(self, folder: Path) -> None:
        (folder / "index.json").unlink()
        with pytest.raises(InputError, match="not a complete shard folder"):
            quarantine_folder(folder)


def test_the_fingerprint_is_the_hash_of_the_index(folder: Path) -> None:
    index = read_index(folder)
    assert index.fingerprint == sha256_json(index_json(index))
    assert json.loads((folder / "index.json").read_text()) == index_json(index)
