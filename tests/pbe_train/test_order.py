"""The order of samples: what makes a resumed or re-cut run see exactly the same data."""

from collections import Counter
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis.strategies import integers, lists, sampled_from, tuples

from pbe_core.randomness import generator
from pbe_train.data.order import BucketOrder, SampleOrder, choose_mask, rank_slots

COUNTS = lists(integers(0, 9), min_size=1, max_size=12).filter(lambda counts: sum(counts) > 0)


@settings(max_examples=40)
@given(counts=COUNTS, window=integers(1, 5), position=integers(0, 300), batch=integers(1, 7))
def test_a_place_depends_on_the_position_alone(counts, window, position, batch):
    """Whatever was asked before, and however positions are cut into steps."""
    used, fresh = SampleOrder(counts, window, 0), SampleOrder(counts, window, 0)
    for earlier in range(0, 300, 37):
        used.at(earlier, 0, 1)
    step, slot = divmod(position, batch)
    assert used.at(step, slot, batch) == fresh.at(position, 0, 1)


def test_shards_of_a_window_are_mixed_and_others_are_not():
    order = SampleOrder([50] * 8, window=4, seed=0)
    first = [order.locate(0, index).shard for index in range(200)]
    assert len(set(first)) == len(set(first[:20])) == 4


def test_seeds_and_epochs_differ():
    orders = [[SampleOrder([20, 20], 2, seed).locate(epoch, index) for index in range(40)] for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@settings(max_examples=60)
@given(counts=COUNTS, window=integers(1, 5), ranks=integers(1, 4), parts=integers(1, 3), size=integers(1, 4), seed=integers(0, 9))
def test_all_ranks_together_see_each_sample_once_an_epoch(counts, window, ranks, parts, size, seed):
    """However the work is cut: the ranks' slices are the global batch, and two epochs of them are two of everything."""
    batch, samples = ranks * parts * size, sum(counts)
    orders = [SampleOrder(counts, window, seed) for _ in range(ranks)]  # One each, as in real ranks.
    slices = [[slot for part in rank_slots(batch, parts, ranks, rank) for slot in part] for rank in range(ranks)]
    assert {len(part) for part in slices} == {batch // ranks}
    assert sorted(slot for part in slices for slot in part) == list(range(batch))
    seen: dict[int, Counter] = {}
    for step in range(-(-2 * samples // batch)):
        for rank, part in enumerate(slices):
            for slot in part:
                epoch, place = orders[rank].at(step, slot, batch)
                seen.setdefault(epoch, Counter())[place] += 1
    everything = Counter((shard, position) for shard, count in enumerate(counts) for position in range(count))
    assert seen[0] == seen[1] == everything


def test_each_mask_of_each_view_gets_its_epochs():
    """Views of one object draw apart from each other, by names that have not changed: resumed runs see the same."""
    chosen = np.array([[choose_mask(0, epoch, f"object_{view}", 3) for epoch in range(300)] for view in (0, 1)])
    assert np.bincount(chosen.ravel(), minlength=3).min() > 150
    assert 0.2 < (chosen[0] == chosen[1]).mean() < 0.47
    assert chosen[0, 7] == generator(0, "train", "mask", 7, "object_0").integers(3)


@settings(max_examples=40)
@given(counts=COUNTS, step=integers(0, 99), slot=integers(0, 9))
def test_a_replacement_is_any_sample_and_depends_on_its_slot_alone(counts, step, slot):
    used, fresh = SampleOrder(counts, 2, 1), SampleOrder(counts, 3, 1)
    used.replacement(step + 1, slot, 0)
    places = [used.replacement(step, slot, attempt) for attempt in range(4)]
    assert places == [fresh.replacement(step, slot, attempt) for attempt in range(4)]
    assert all(0 <= place.position < counts[place.shard] for place in places)
    assert len({SampleOrder([3, 0, 5, 2], 2, 0).replacement(number, 0, 0) for number in range(200)}) == 10


# Samples and bucket of each shard.
BUCKETED = lists(tuples(integers(0, 9), sampled_from([(64, 32), (48, 48), (32, 64)])), min_size=1, max_size=12).filter(
    lambda shards: sum(count for count, _ in shards) > 0
)


def bucket_order(shards: list[tuple[int, tuple[int, int]]], window: int = 2, seed: int = 0) -> BucketOrder:
    counts, buckets = zip(*shards, strict=True)
    return BucketOrder(counts, window, seed, buckets)


@settings(max_examples=60)
@given(
    shards=BUCKETED, window=integers(1, 5), ranks=integers(1, 3), parts=integers(1, 3), size=integers(1, 3), seed=integers(0, 9)
)
def test_a_step_is_of_one_bucket_whose_samples_come_once_in_each_of_its_epochs(shards, window, ranks, parts, size, seed):
    """Over two epochs of every bucket, however the work is cut; each rank and micro-batch asks an order of its own."""
    batch, samples = ranks * parts * size, sum(count for count, _ in shards)
    orders = [bucket_order(shards, window, seed) for _ in range(ranks)]
    slices = [[slot for part in rank_slots(batch, parts, ranks, rank) for slot in part] for rank in range(ranks)]
    seen: dict[tuple[int, ...], dict[int, Counter]] = {}
    # A bucket's steps come evenly, so that each had all of two epochs after two epochs of all and two steps of its own.
    smallest = min(n for n in Counter({b: sum(c for c, o in shards if o == b) for _, b in shards}).values() if n)
    for step in range(-(-2 * samples // batch) + -(-2 * samples // smallest)):
        (bucket,) = {order.bucket(step) for order in orders}
        for rank, part in enumerate(slices):
            for slot in part:
                epoch, place = orders[rank].at(step, slot, batch)
                assert shards[place.shard][1] == bucket
                seen.setdefault(bucket, {}).setdefault(epoch, Counter())[place] += 1
    for bucket in {own for count, own in shards if count}:
        everything = Counter(
            (shard, position) for shard, (count, own) in enumerate(shards) if own == bucket for position in range(count)
        )
        assert seen[bucket][0] == seen[bucket][1] == everything


@settings(max_examples=60)
@given(shards=BUCKETED, steps=integers(0, 400))
def test_buckets_have_their_share_of_the_steps_from_the_beginning(shards, steps):
    """After any number of steps no bucket is more than a step, and a half for each other bucket, from its share."""
    order = bucket_order(shards)
    sizes = Counter()
    for count, own in shards:
        sizes[own] += count
    had = Counter(order.bucket(step) for step in range(steps))
    for own, size in sizes.items():
        assert abs(had[own] - Fraction(steps * size, sizes.total())) <= 1 + Fraction(len(sizes), 2)


def test_buckets_take_turns_and_none_waits_for_the_end():
    order = bucket_order([(60, (2, 1)), (30, (1, 1)), (10, (1, 2))])
    turns = [order.bucket(step) for step in range(20)]
    assert Counter(turns) == {(2, 1): 12, (1, 1): 6, (1, 2): 2}
    assert Counter(turns[:10]) == {(2, 1): 6, (1, 1): 3, (1, 2): 1}
    assert max(len(run) for run in "".join("a" if turn == (2, 1) else " " for turn in turns).split()) <= 3


@settings(max_examples=40)
@given(shards=BUCKETED, step=integers(0, 10**7), slot=integers(0, 9), batch=integers(10, 20))
def test_a_step_of_buckets_depends_on_its_number_alone(shards, step, slot, batch):
    """What was asked before, and how shards stand in the table, have no say: a resumed run sees the same."""
    used, fresh = bucket_order(shards), bucket_order(shards)
    for earlier in (step + 1, 0, step // 2):
        used.at(earlier, slot, batch)
    assert used.at(step, slot, batch) == fresh.at(step, slot, batch)
    assert used.replacement(step, slot, 1) == fresh.replacement(step, slot, 1)
    assert shards[fresh.replacement(step, slot, 1).shard][1] == fresh.bucket(step)


@settings(max_examples=40)
@given(counts=COUNTS, window=integers(1, 5), step=integers(0, 99), slot=integers(0, 6), seed=integers(0, 9))
def test_one_bucket_is_the_order_of_squares(counts, window, step, slot, seed):
    """Runs on square views go on as they began."""
    one, plain = BucketOrder(counts, window, seed, [()] * len(counts)), SampleOrder(counts, window, seed)
    assert one.at(step, slot, 7) == plain.at(step, slot, 7)
    assert one.replacement(step, slot, 0) == plain.replacement(step, slot, 0)
