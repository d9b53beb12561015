"""The order of samples: what makes a resumed or re-cut run see exactly the same data."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis.strategies import integers, lists

from pbe_train.data.order import SampleOrder, rank_slots

COUNTS = lists(integers(0, 9), min_size=1, max_size=12).filter(lambda counts: sum(counts) > 0)


@settings(deadline=None, max_examples=60)
@given(counts=COUNTS, window=integers(1, 5), epoch=integers(0, 3), seed=integers(0, 9))
def test_an_epoch_holds_each_sample_exactly_once(counts, window, epoch, seed):
    order = SampleOrder(counts, window, seed)
    seen = Counter(order.locate(epoch, index) for index in range(sum(counts)))
    assert seen == Counter((shard, position) for shard, count in enumerate(counts) for position in range(count))


@settings(deadline=None, max_examples=40)
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
    assert len(set(first)) == 4
    assert len(set(first[:20])) == 4


def test_seeds_and_epochs_differ():
    orders = [[SampleOrder([20, 20], 2, seed).locate(epoch, index) for index in range(40)] for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@given(size=integers(1, 4), accumulation=integers(1, 4), ranks=integers(1, 5))
def test_ranks_take_equal_slices_of_the_global_batch(size, accumulation, ranks):
    batch = size * accumulation * ranks
    shares = [rank_slots(batch, accumulation, ranks, rank) for rank in range(ranks)]
    assert [slot for share in shares for part in share for slot in part] == list(range(batch))
    assert {len(part) for share in shares for part in share} == {size}


def test_an_uneven_cut_is_refused():
    with pytest.raises(ValueError, match="global_batch 6 cannot be cut evenly into 4 ranks"):
        rank_slots(6, 1, 4, 0)
