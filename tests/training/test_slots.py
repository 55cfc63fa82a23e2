"""Rows by tokens: even sums, every row once, the same on every rank and from any step on."""

import itertools
import random

import pytest

from psa_fast.data import GlobalBatchSampler
from psa_fast.training.config import TrainConfig
from psa_fast.training.micro_batches import Schedule, needs_lengths
from psa_fast.training.slots import deal, even_slots, slots_within


def mixed_lengths(count, seed):
    """Rows with an image and rows without, few long, most short."""
    rng = random.Random(seed)
    return [rng.choice((0, 640, 640)) + int(min(1400, 20 + rng.expovariate(1 / 250))) for _ in range(count)]


def sums(lengths, slots):
    return [sum(lengths[i] for i in slot) for slot in slots]


def best_largest_sum(lengths, slots):
    """Over every assignment there is."""
    return min(
        max(sum(n for n, at in zip(lengths, places, strict=True) if at == slot) for slot in range(slots))
        for places in itertools.product(range(slots), repeat=len(lengths))
    )


@pytest.mark.parametrize(("count", "slots"), [(1, 1), (5, 5), (16, 4), (128, 16), (37, 8), (40, 1)])
def test_every_row_lies_in_one_slot_and_none_is_empty(count, slots):
    for seed in range(5):
        lengths = mixed_lengths(count, seed)
        found = even_slots(lengths, slots)
        assert sorted(i for slot in found for i in slot) == list(range(count))
        assert len(found) == slots
        assert all(slot == sorted(slot) for slot in found)
        assert min(map(len, found)) >= 1
        assert sums(lengths, found) == sorted(sums(lengths, found), reverse=True)
        if count % slots == 0:
            equal = even_slots(lengths, slots, count // slots)
            assert sorted(i for slot in equal for i in slot) == list(range(count))
            assert [len(slot) for slot in equal] == [count // slots] * slots


def test_sums_are_near_the_best_there_is():
    assert sums([8, 7, 6, 5, 4], even_slots([8, 7, 6, 5, 4], 2)) == [16, 14]  # the textbook's example
    assert sums([1, 1, 1, 9, 9, 9], even_slots([1, 1, 1, 9, 9, 9], 3, 2)) == [10, 10, 10]
    for seed in range(20):
        for slots in (2, 3):
            lengths = mixed_lengths(7, seed)
            # the differencing method's own bound
            assert max(sums(lengths, even_slots(lengths, slots))) <= 4 / 3 * best_largest_sum(lengths, slots)


def test_the_budget_is_kept_with_the_fewest_slots():
    for seed in range(20):
        for world_size in (1, 2):
            lengths = mixed_lengths(6, seed)
            budget = max(lengths) + 50 * seed
            found = slots_within(lengths, budget, world_size)
            assert max(sums(lengths, found)) <= budget
            enough = (n for n in (1, 2, 3, 4, 5, 6) if n % world_size == 0 and best_largest_sum(lengths, n) <= budget)
            assert len(found) == next(enough)
    assert len(slots_within([5, 5, 5, 5], 5, 2)) == 4
    assert len(slots_within([5, 1, 1, 1], 100, 2)) == 2
    with pytest.raises(ValueError, match="a row has 9 tokens, more than the 8"):
        slots_within([9, 1], 8, 1)
    with pytest.raises(ValueError, match="3 rows cannot give at least one row to each of 4 slots"):
        even_slots([1, 1, 1], 4)
    with pytest.raises(ValueError, match="3 rows cannot give 2 rows to each of 2 slots"):
        even_slots([1, 1, 1], 2, 2)


def test_ranks_run_neighbours_at_the_same_time():
    slots = [[i] for i in range(6)]
    assert deal(slots, 0, 2) == [[0], [3], [4]]
    assert deal(slots, 1, 2) == [[1], [2], [5]]
    assert deal(slots, 0, 1) == slots


def schedules(world_size, lengths, start=0, stop=6, **options):
    config = TrainConfig(global_batch_size=64, **options)
    length = None if lengths is None else (lambda index, epoch: lengths[index] + epoch)
    sampler = GlobalBatchSampler(150, 64, seed=3)
    return [Schedule(sampler, config, rank, world_size, start, stop, length) for rank in range(world_size)]


@pytest.mark.parametrize("options", [{"micro_batch_size": 2}, {"max_tokens_per_micro_batch": 4096}])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_ranks_share_the_global_batch_from_any_step_on(world_size, options):
    lengths = mixed_lengths(150, 1)
    ranks = schedules(world_size, lengths, **options)
    for step in range(6):
        shares = [rank.micro_batches(step) for rank in ranks]
        assert len({len(share) for share in shares}) == 1
        micro = [rows for share in shares for rows in share]
        assert sorted(row for rows in micro for row in rows) == sorted(ranks[0].sampler.batch(step))
        if "micro_batch_size" in options:
            assert {len(rows) for rows in micro} == {2}
        else:
            assert max(sum(lengths[i] + epoch for i, epoch in rows) for rows in micro) <= 4096
    for rank, resumed in zip(ranks, schedules(world_size, lengths, start=4, **options), strict=True):
        assert list(resumed) == [rows for step in (4, 5) for rows in rank.micro_batches(step)]
        assert list(rank)[-len(list(resumed)) :] == list(resumed)


@pytest.mark.parametrize("world_size", [2, 8])
def test_no_rank_waits_for_a_longer_one(world_size):
    lengths = mixed_lengths(150, 2)

    def waiting(by_tokens, **options):
        """Tokens that the busiest rank of each micro-step runs, over the mean rank's."""
        ranks = schedules(world_size, lengths if by_tokens else None, **options)
        found = []
        for step in range(6):
            tokens = [[sum(lengths[i] for i, _ in rows) for rows in rank.micro_batches(step)] for rank in ranks]
            found.append(sum(map(max, zip(*tokens, strict=True))) / (sum(map(sum, tokens)) / world_size))
        return max(found)

    assert waiting(False, micro_batch_size=2) > 1.15
    assert waiting(True, micro_batch_size=2) < 1.05
    assert waiting(True, max_tokens_per_micro_batch=4096) < 1.02


def test_lengths_are_asked_for_only_where_they_decide():
    def asks(**options):
        return needs_lengths(TrainConfig(**{"global_batch_size": 4, "micro_batch_size": 2} | options))

    assert asks()
    assert not asks(micro_batch_size=4)
    assert asks(micro_batch_size=4, max_tokens_per_micro_batch=4096)
    assert not asks(packing=False)
    assert not asks(stage1_objective="concept")
