"""Resumes with other workers, on other sources, by other numbers of processes: the same samples in the same order."""

from itertools import cycle, product
from pathlib import Path

from .apparatus import sets
from .apparatus.comparing import (
    GLOBAL_BATCH_SIZE,
    NO_CHANCE,
    STEPS_PER_EPOCH,
    compare,
    figures_of,
    largest_difference,
    reference,
    stop_at,
)
from .apparatus.runs import Run
from .outcome import Outcome

# three in one epoch, across an epoch's end, in the third epoch
STOPS = (5, 9, 17, STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH + 7)
STEPS = 3 * STEPS_PER_EPOCH
WORKERS = (0, 2, 4)
TOLERANCE = 1e-3  # of a loss, relative to it or to 1: sums over processes are rounded in another order


def resumes(folder: Path, kind: str) -> Outcome:
    """Stops a run five times, and goes on each time with another number of workers.

    Args:
        kind: of the digits' source, see `sets.flags_of`.
    """
    whole = reference(folder / "whole", STEPS, **sets.flags_of(kind, folder))
    stopped = Run(folder / "stopped", whole.flags)
    for step, num_workers in zip(STOPS, cycle(WORKERS), strict=False):
        stop_at(stopped, step, dataloader_num_workers=num_workers)
    comparison = compare(stopped.finish(dataloader_num_workers=WORKERS[-1]), whole)
    first = [passes[0] for passes in stopped.record.steps_by_start().values()]
    fell_right = first[3] <= STEPS_PER_EPOCH < 2 * STEPS_PER_EPOCH < first[5] and first == sorted(set(first))
    return Outcome(
        drill=f"five resumes, with 0, 2 and 4 workers by turns: {kind}",
        passed=comparison.equal and fell_right,
        figures={
            "resumed before steps": first[1:],
            "steps of an epoch": STEPS_PER_EPOCH,
            "order": whole.record.order_hash(),
            "order after resumes": stopped.record.order_hash(),
            **figures_of([comparison]),
        },
    )


def orders(folder: Path, world_sizes: tuple[int, ...], workers: tuple[int, ...]) -> Outcome:
    """The order of a streamed set by workers and processes, at one global batch."""
    flags = {"max_train_steps": STEPS_PER_EPOCH + 2, **sets.flags_of("streamed parquet", folder)}
    hashes = {}
    for num_processes, num_workers in product(world_sizes, workers):
        sizes = {"per_device_train_batch_size": GLOBAL_BATCH_SIZE // num_processes}
        sizes |= {"dataloader_num_workers": num_workers}
        run = Run(folder / f"{num_processes}-{num_workers}", {**flags, **sizes}, num_processes).finish()
        hashes[f"processes: {num_processes}, workers of each: {num_workers}"] = run.record.order_hash()
    return Outcome(
        drill="the order of streamed samples, by processes and workers",
        passed=len(set(hashes.values())) == 1,
        figures={"different orders": len(set(hashes.values())), "order hash": hashes},
    )


def world_sizes(folder: Path, steps: int = 48) -> Outcome:
    """One process, then two, four and one again, at the same global batch."""
    whole = reference(folder / "whole", steps, logging_steps=5, **NO_CHANCE)
    changing = Run(folder / "changing", whole.flags)
    for quarter, num_processes in ((1, 1), (2, 2), (3, 4)):
        changing.num_processes = num_processes
        stop_at(changing, quarter * steps // 4, per_device_train_batch_size=GLOBAL_BATCH_SIZE // num_processes)
    changing.num_processes = 1
    changing.finish()
    comparison, difference = compare(changing, whole), largest_difference(whole, changing)
    by_start = changing.record.steps_by_start()
    return Outcome(
        drill="1, 2, 4 and 1 processes in turn, at one global batch",
        passed=comparison.same_order and difference < TOLERANCE and len(by_start) == 4,
        figures={
            "steps by each": [len(each) for each in by_start.values()],
            "same samples, crops and noise": comparison.same_order,
            "samples lost": comparison.lost,
            "samples repeated": comparison.repeated,
            "largest difference of a loss": f"{difference:.1e}",
            "tolerance": f"{TOLERANCE:.0e}",
        },
    )
