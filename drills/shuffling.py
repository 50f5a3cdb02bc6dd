"""How well a stream is shuffled, and what it holds in memory for that, by its order alone."""

import statistics
from pathlib import Path

import numpy as np

from mimae.data.batches.loaders import BatchPlan, BlockReader
from mimae.data.order import SampleOrder
from mimae.data.sources.base import Row, RowSource
from mimae.flags.data import DataArguments

from .outcome import Outcome

# ILSVRC/imagenet-1k on the Hub: 294 shards of about 4,358 images, in row groups of 100
NUM_IMAGES, SHARDS, ROWS_PER_GROUP = 1_281_167, 294, 100
BYTES_PER_IMAGE = 110_000  # of its JPEGs, on average
WORKERS, BATCH_SIZE, PROCESSES = 8, 128, 1
DECODED_AHEAD = 2 * WORKERS * BATCH_SIZE * 3 * 224 * 224  # bytes: each worker is two batches ahead


def travel(_: Path) -> Outcome:
    """How far the images of an epoch stand from where they stood in the one before, and neighbours from each other."""
    window = DataArguments().shuffle_window
    sizes = block_sizes()
    order = SampleOrder(sizes, seed=0, window=window)
    first, second = (positions(order, epoch) for epoch in (0, 1))
    moved = np.abs(first - second) / NUM_IMAGES
    block = np.repeat(np.arange(len(sizes)), sizes)
    apart = np.abs(np.diff(first))[np.diff(block) == 0]
    correlation = abs(np.corrcoef(np.arange(NUM_IMAGES), first)[0, 1])
    is_uniform = moved.max() > 0.99 and abs(moved.mean() - 1 / 3) < 0.02
    return Outcome(
        drill="shuffling of a stream laid out as ImageNet is on the Hub, from one epoch to the next",
        passed=bool(is_uniform and apart.max() <= window + ROWS_PER_GROUP),
        figures={
            "an image moves by, mean (1/3 if uniform)": f"{moved.mean():.3f} of the epoch",
            "at most": f"{moved.max():.3f} of the epoch",
            "correlation of place on disk and in the epoch": f"{correlation:.3f}",
            "images next to each other on disk come apart by, median": int(np.median(apart)),
            "apart at most": int(apart.max()),
            "shuffle_window": window,
        },
    )


def memory(_: Path) -> Outcome:
    """The most encoded images that the workers hold at a time, against the bound that `BlockReader` states."""
    window, sizes = DataArguments().shuffle_window, block_sizes()[: 6 * DataArguments().shuffle_window // 100]
    order = SampleOrder(sizes, seed=0, window=window)
    plans = [plan_of(order, process) for process in range(PROCESSES) for _ in range(WORKERS)]
    readers = [BlockReader(Rows(sizes), plan) for plan in plans]
    held = []
    for number, request in enumerate(readers[0].plan.requests_of_epoch(0)):
        for reader in readers[number % WORKERS :: WORKERS]:
            reader(request)
        held.append(sum(len(reader.kept) for reader in readers))
    bound = 2 * max(window, ROWS_PER_GROUP)
    return Outcome(
        drill=f"memory of that stream, {WORKERS} workers",
        passed=max(held) <= bound,
        figures={
            "most encoded images held, all workers together": max(held),
            "median": int(statistics.median(held)),
            "bound": bound,
            "bound in GB at 110 kB an image": round(bound * BYTES_PER_IMAGE / 1e9, 1),
            "beside it in each worker, one row group in MB": round(ROWS_PER_GROUP * BYTES_PER_IMAGE / 1e6),
            "and decoded batches of 128 at 224 px ahead of the step, in GB": round(DECODED_AHEAD / 1e9, 1),
        },
    )


def block_sizes() -> np.ndarray:
    """Rows of each row group: int64 (groups,)."""
    per_shard = np.diff(np.linspace(0, NUM_IMAGES, SHARDS + 1).astype(np.int64))
    groups = [[ROWS_PER_GROUP] * (rows // ROWS_PER_GROUP) + [rows % ROWS_PER_GROUP] for rows in per_shard.tolist()]
    sizes: np.ndarray = np.concatenate(groups)
    return sizes[sizes > 0]


def positions(order: SampleOrder, epoch: int) -> np.ndarray:
    """Where each image stands in an epoch: int64 (images,)."""
    at = np.empty(len(order), dtype=np.int64)
    at[order.slice(epoch, 0, len(order))] = np.arange(len(order))
    return at


def plan_of(order: SampleOrder, process: int) -> BatchPlan:
    """What one of the processes takes."""
    global_batch_size = BATCH_SIZE * PROCESSES
    return BatchPlan(
        order,
        per_device_batch_size=BATCH_SIZE,
        global_batch_size=global_batch_size,
        process_index=process,
        samples_used=len(order) // global_batch_size * global_batch_size,
        stride=WORKERS,
    )


class Rows(RowSource):
    """Rows of nothing."""

    reads_blocks = True

    def __init__(self, sizes: np.ndarray):
        self.block_sizes = sizes

    def read(self, index: int) -> Row:
        return b"", None

    def describe(self, index: int) -> str:
        return str(index)
