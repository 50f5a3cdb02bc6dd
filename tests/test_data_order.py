"""The order is a permutation by (seed, epoch), sliced lazily, and reaches as far as it says."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimae.data.batches.loaders import BatchPlan, BatchRequest, BlockReader
from mimae.data.order import SampleOrder, augmentation_seed, sample_noise
from mimae.data.sources.base import RowSource

BLOCKS = st.lists(st.integers(1, 30), min_size=1, max_size=20)
SEEDS = st.integers(0, 2**40)
EPOCHS = st.integers(0, 1000)


@settings(max_examples=60, deadline=None)
@given(BLOCKS, SEEDS, EPOCHS, st.integers(1, 80))
def test_every_epoch_is_a_permutation(sizes, seed, epoch, window):
    order = SampleOrder(sizes, seed, window)
    assert sorted(order.slice(epoch, 0, len(order))) == list(range(sum(sizes)))


@settings(max_examples=60, deadline=None)
@given(BLOCKS, SEEDS, EPOCHS, st.integers(1, 80), st.data())
def test_slices_join_to_the_whole_wherever_it_is_cut(sizes, seed, epoch, window, data):
    order = SampleOrder(sizes, seed, window)
    whole = SampleOrder(sizes, seed, window).slice(epoch, 0, len(order))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=5)))
    edges = [0, *cuts, len(order)]
    pieces = [order.slice(epoch, first, last) for first, last in reversed(list(pairwise(edges)))]
    assert np.concatenate(pieces[::-1]).tolist() == whole.tolist()


class Numbers(RowSource):
    """Rows that are their own indices, in blocks."""

    reads_blocks = True

    def __init__(self, block_sizes):
        self.block_sizes = np.array(block_sizes)

    def read(self, index):
        return index, None

    def describe(self, index):
        return str(index)


def rows_seen(order, steps, processes, workers, global_batch):
    """What so many processes of so many workers read in these steps, the batches dealt to workers in turn."""
    sizes = {"per_device_batch_size": global_batch // processes, "global_batch_size": global_batch}
    sizes |= {"samples_used": len(order) // global_batch * global_batch, "stride": workers}
    plans = [BatchPlan(order, process_index=process, **sizes) for process in range(processes)]
    readers = [[BlockReader(Numbers(order.block_sizes), plan) for _ in range(workers)] for plan in plans]
    for number, (epoch, step) in enumerate(steps):
        for of_process in readers:
            yield from (row for row, _ in of_process[number % workers](BatchRequest(epoch, step * global_batch)))


@settings(max_examples=150, deadline=None)
@given(BLOCKS, SEEDS, EPOCHS, st.integers(1, 80), st.integers(1, 6), st.data())
def test_any_processes_workers_cut_and_resume_see_each_sample_once(sizes, seed, epoch, window, quarter, data):
    global_batch, whole = 4 * quarter, SampleOrder(sizes, seed, window)
    steps = [(each, step) for each in (epoch, epoch + 1) for step in range(len(whole) // global_batch)]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(steps)), max_size=3)))
    seen = []
    for start, stop in pairwise([0, *cuts, len(steps)]):  # each part is a run of its own that takes over
        processes, workers = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 4))
        order = SampleOrder(sizes, seed, window)
        seen += rows_seen(order, steps[start:stop], processes, workers, global_batch)
    used = len(whole) // global_batch * global_batch
    assert seen == [row for each in (epoch, epoch + 1) for row in whole.slice(each, 0, used).tolist()]
    assert max(Counter(seen[:used]).values(), default=1) == max(Counter(seen[used:]).values(), default=1) == 1


@settings(max_examples=60, deadline=None)
@given(BLOCKS, SEEDS, st.integers(1, 80))
def test_rows_of_a_block_stay_within_a_window_of_whole_blocks(sizes, seed, window):
    order = SampleOrder(sizes, seed, window)
    rows = order.slice(0, 0, len(order))
    blocks = np.searchsorted(np.cumsum(sizes), rows, side="right")
    for block, size in enumerate(sizes):
        positions = np.flatnonzero(blocks == block)
        assert positions.max() - positions.min() < max(window, size)
        assert order.window_end(0, positions.min()) == order.window_end(0, positions.max())


def test_seed_and_epoch_each_change_the_order_and_the_same_pair_repeats_it():
    order = SampleOrder([10] * 50, 1, 100)
    first = order.slice(0, 0, 500)
    assert not np.array_equal(first, order.slice(1, 0, 500))
    assert not np.array_equal(first, SampleOrder([10] * 50, 2, 100).slice(0, 0, 500))
    assert np.array_equal(first, order.slice(0, 0, 500))


def test_one_block_is_fully_shuffled_and_a_window_over_all_blocks_too():
    for order in (SampleOrder([2000], 0, 1), SampleOrder([10] * 200, 0, 2000)):
        places = order.slice(0, 0, 2000)
        assert abs(np.corrcoef(places, np.arange(2000))[0, 1]) < 0.1
        assert (np.abs(places - np.arange(2000)) > 1000).mean() > 0.2  # 0.25 in a uniform permutation


def test_blocks_travel_over_the_whole_epoch():
    """Row 0 must be able to come anywhere: over many epochs, its place is uniform."""
    order = SampleOrder([10] * 100, 0, 50)
    places = [int(np.flatnonzero(order.slice(epoch, 0, 1000) == 0)[0]) for epoch in range(200)]
    assert np.histogram(places, bins=4, range=(0, 1000))[0].min() > 25  # 50 expected


def test_a_slice_does_not_cost_an_epoch():
    """ImageNet's size: 100 batches of 4096 must sort no more windows than they touch."""
    order = SampleOrder([100] * 12812, 0, 8192)
    drawn = []
    draw = order._draw_window
    order._draw_window = lambda epoch, k: drawn.append(k) or draw(epoch, k)
    for start in range(0, 409600, 512):
        order.slice(0, start, start + 512)
    assert len(drawn) == len(set(drawn)) == -(-409600 // 8100)  # 81 blocks of 100 fit in 8192 rows


def test_the_order_is_the_one_it_always_was():
    """Pinned values: a change here makes every old checkpoint resume into another order."""
    assert SampleOrder([3, 2, 4], 7, 5).slice(2, 0, 9).tolist() == [3, 0, 1, 4, 2, 6, 8, 5, 7]
    assert augmentation_seed(7, 2, 5) == 8407349036932200705
    assert sample_noise(7, 2, 5, (2,)).tolist() == [0.11719471216201782, 0.8373291492462158]


def test_noise_is_uniform_below_one_and_differs_by_every_argument():
    noise = sample_noise(0, 0, 0, (4, 5000))
    assert noise.dtype == np.float32
    assert noise.shape == (4, 5000)
    assert noise.min() >= 0
    assert noise.max() < 1
    assert abs(noise.mean() - 0.5) < 0.01
    assert abs(noise.std() - 12**-0.5) < 0.01
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not np.array_equal(noise, sample_noise(*other, (4, 5000)))


@pytest.mark.parametrize(("seed", "window", "message"), [(-1, 8, "seed"), (0, 0, "shuffle_window")])
def test_impossible_orders_are_refused_by_name(seed, window, message):
    with pytest.raises(ValueError, match=message):
        SampleOrder([1], seed, window)
