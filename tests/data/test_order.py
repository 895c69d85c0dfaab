"""The order of an epoch: exact, fixed by the seed, the same for any number of ranks."""

import itertools
import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from mera_ds.data.order import (
    Unit,
    epoch_order,
    rank_share,
    step_batches,
    steps_per_epoch,
)

Lengths = dict[str, list[int]]


def lengths(seed: int = 0, **counts: int) -> Lengths:
    """Return random lengths for some numbers of units."""
    generator = random.Random(seed)
    return {name: [generator.randint(1, 500) for _ in range(n)] for name, n in counts.items()}


def batches(order: list[Unit], batch_size: int) -> list[list[Unit]]:
    """Return the global batches of an epoch."""
    steps = range(steps_per_epoch(len(order), batch_size))
    return [list(step_batches(order, batch_size, step)) for step in steps]


MIXTURES = [
    lengths(image=1),
    lengths(image=64),
    lengths(image=61, video=7),
    lengths(image=500, video=30, audio=1, pointcloud=200),
]


class TestEpoch:
    @pytest.mark.parametrize("mixture", MIXTURES)
    @pytest.mark.parametrize("batch_size", [1, 8, 16, 10_000])
    def test_every_unit_comes_exactly_once(self, mixture: Lengths, batch_size: int) -> None:
        expected = {(name, unit) for name, entry in mixture.items() for unit in range(len(entry))}
        order = epoch_order(mixture, batch_size, seed=0, epoch=0)
        assert len(order) == len(expected)
        assert set(order) == expected
        assert [unit for batch in batches(order, batch_size) for unit in batch] == order

    def test_it_is_fixed_by_seed_and_epoch(self) -> None:
        mixture = MIXTURES[3]
        first = epoch_order(mixture, 16, seed=3, epoch=1)
        random.seed(99)
        assert epoch_order(mixture, 16, seed=3, epoch=1) == first
        assert epoch_order(mixture, 16, seed=4, epoch=1) != first
        assert epoch_order(mixture, 16, seed=3, epoch=2) != first

    def test_one_modality_has_its_order_whatever_the_others_are(self) -> None:
        """Or its epochs would repeat: the name of the modality is part of the seed."""
        twins = {"image": [1] * 64, "video": [1] * 64}
        order = epoch_order(twins, 8, seed=0, epoch=0)
        images, videos = (
            [unit for name, unit in order if name == modality] for modality in ("image", "video")
        )
        assert images != videos

    def test_an_empty_modality_is_no_problem(self) -> None:
        order = epoch_order({"image": [1, 2], "video": []}, 2, seed=0, epoch=0)
        assert sorted(order) == [("image", 0), ("image", 1)]

    @pytest.mark.parametrize(
        ("units", "batch_size", "steps"), [(1, 16, 1), (16, 16, 1), (17, 16, 2), (160, 16, 10)]
    )
    def test_its_number_of_steps_is_exact(self, units: int, batch_size: int, steps: int) -> None:
        assert steps_per_epoch(units, batch_size) == steps


class TestMixture:
    @pytest.mark.parametrize("epoch", range(3))
    def test_each_step_holds_all_modalities_in_proportion(self, epoch: int) -> None:
        mixture = lengths(image=800, video=160, audio=80, pointcloud=400)
        order = epoch_order(mixture, 36, seed=0, epoch=epoch)
        for batch in batches(order, 36):
            counts = Counter(name for name, _ in batch)
            for name, entry in mixture.items():
                expected = len(batch) * len(entry) / len(order)
                assert abs(counts[name] - expected) <= 1, (name, counts)

    def test_a_rare_modality_comes_at_even_distances(self) -> None:
        order = epoch_order(lengths(image=990, audio=10), 16, seed=0, epoch=0)
        places = [place for place, (name, _) in enumerate(order) if name == "audio"]
        assert all(90 <= b - a <= 110 for a, b in pairwise(places))


class TestLengths:
    def test_a_batch_holds_units_of_similar_length(self) -> None:
        mixture = lengths(image=1600)
        order = epoch_order(mixture, 16, seed=0, epoch=0)

        def padding(units: list[Unit]) -> int:
            sizes = [mixture["image"][unit] for _, unit in units]
            return max(sizes) * len(sizes) - sum(sizes)

        grouped = sum(padding(batch) for batch in batches(order, 16))
        shuffled = random.Random(0).sample(order, len(order))
        assert grouped < 0.7 * sum(padding(batch) for batch in batches(shuffled, 16))

    def test_but_batches_come_in_random_order_of_length(self) -> None:
        mixture = lengths(image=1600)
        order = epoch_order(mixture, 16, seed=0, epoch=0)
        means = [
            sum(mixture["image"][unit] for _, unit in batch) / len(batch)
            for batch in batches(order, 16)
        ]
        rises = sum(a < b for a, b in pairwise(means))
        assert 0.3 < rises / len(means) < 0.7

    def test_a_sample_meets_others_in_the_next_epoch(self) -> None:
        mixture = lengths(image=320)
        partners = []
        for epoch in range(2):
            found = batches(epoch_order(mixture, 16, seed=0, epoch=epoch), 16)
            partners.append({unit: frozenset(batch) for batch in found for unit in batch})
        shared = [len(partners[0][unit] & partners[1][unit]) for unit in partners[0]]
        assert sum(shared) / len(shared) < 12


class TestTogether:
    SIZES = np.random.default_rng(0).integers(1, 90, 900).tolist()
    MEDIA = np.repeat(np.arange(45), 20)

    def order(self, together: int, epoch: int = 0) -> list[int]:
        found = epoch_order({"video": self.SIZES}, 16, 0, epoch, {"video": self.MEDIA}, together)
        return [unit for _, unit in found]

    @pytest.mark.parametrize("together", [1, 3, 8, 40])
    def test_every_text_comes_once(self, together: int) -> None:
        assert sorted(self.order(together)) == list(range(900))
        assert self.order(together) == self.order(together) != self.order(together, epoch=1)

    def test_one_is_the_order_that_is_known_without_media(self) -> None:
        plain = epoch_order({"video": self.SIZES}, 16, 0, 0)
        assert self.order(1) == [unit for _, unit in plain]

    def test_chunks_of_a_medium_stand_together_and_apart_from_its_others(self) -> None:
        media = self.MEDIA[self.order(8)]
        runs = [len(list(run)) for _, run in itertools.groupby(media.tolist())]
        assert len(runs) > 0.9 * 45 * 3, "chunks of a medium are shuffled"
        assert np.mean(runs) > 6
        changes = [len(set(media[start : start + 16].tolist())) for start in range(0, 900, 16)]
        assert np.mean(changes) < 4

    def test_a_rank_gets_neighbours(self) -> None:
        batch = [("video", unit) for unit in range(13)]
        shares = [rank_share(batch, ["video"], rank, 3, 2, neighbours=True) for rank in range(3)]
        assert [[micro.units for micro in share] for share in shares] == [
            [(0, 1), (6, 7), (12,)],
            [(2, 3), (8, 9), (12,)],
            [(4, 5), (10, 11), (12,)],
        ]
        last = [share[-1].counted for share in shares]
        assert sorted(last) == [(False,), (False,), (True,)]


class TestRanks:
    MODALITIES = ("image", "video", "audio", "pointcloud")

    @pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
    @pytest.mark.parametrize("micro_batch", [1, 3, 16])
    def test_the_ranks_share_a_global_batch_without_loss_or_repetition(
        self, world: int, micro_batch: int
    ) -> None:
        for batch in batches(epoch_order(MIXTURES[3], 32, seed=0, epoch=0), 32):
            shares = [
                rank_share(batch, self.MODALITIES, rank, world, micro_batch)
                for rank in range(world)
            ]
            counted = [
                (micro.modality, unit)
                for share in shares
                for micro in share
                for unit, counts in zip(micro.units, micro.counted, strict=True)
                if counts
            ]
            assert sorted(counted) == sorted(batch)

    @pytest.mark.parametrize("world", [2, 3, 4, 8])
    @pytest.mark.parametrize("micro_batch", [1, 3, 16])
    def test_all_ranks_take_the_same_modalities_at_the_same_time(
        self, world: int, micro_batch: int
    ) -> None:
        for batch in batches(epoch_order(MIXTURES[3], 32, seed=0, epoch=0), 32):
            shares = [
                rank_share(batch, self.MODALITIES, rank, world, micro_batch)
                for rank in range(world)
            ]
            kinds = [[micro.modality for micro in share] for share in shares]
            assert all(kind == kinds[0] for kind in kinds)
            for micro in (micro for share in shares for micro in share):
                assert 1 <= len(micro.units) <= micro_batch
                assert any(micro.counted) == all(micro.counted)
            for at_once in zip(*shares, strict=True):
                sizes = [sum(micro.counted) for micro in at_once]
                assert max(sizes) - min(sizes) <= 1, "the work is not equal"

    def test_a_rank_without_a_sample_of_its_own_repeats_one_that_does_not_count(self) -> None:
        shares = [rank_share([("image", 5)], ("image",), rank, 3, 4) for rank in range(3)]
        assert [share[0].units for share in shares] == [(5,), (5,), (5,)]
        assert [share[0].counted for share in shares] == [(True,), (False,), (False,)]

    def test_modalities_come_in_the_order_of_the_mixture(self) -> None:
        batch = [("audio", 0), ("image", 0), ("audio", 1), ("video", 0)]
        share = rank_share(batch, self.MODALITIES, 0, 1, 16)
        assert [micro.modality for micro in share] == ["image", "video", "audio"]
