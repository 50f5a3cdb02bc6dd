"""Resumes with other workers, on other sources, by other numbers of processes: the same samples in the same order."""

import math
import signal
from itertools import product
from pathlib import Path

from . import sets
from .kills import reference
from .outcome import Outcome, compared
from .runs import Run

STEPS_PER_EPOCH = 22  # of 64 of the 1,437 training digits
# three in one epoch, across an epoch's end, in the third epoch
STOPS = (5, 9, 17, STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH + 7)
STEPS = 3 * STEPS_PER_EPOCH
WORKERS = (0, 2, 4)
GLOBAL_BATCH_SIZE = 64
LOSSES = ("reconstruction_loss", "mi_max_loss", "mi_min_loss", "approximation_loss")
TOLERANCE = 1e-3  # of a loss, relative to it or to 1: sums over processes are rounded in another order


def stop_at(run: Run, step: int) -> None:
    """Waits for a step, asks the run to stop and waits for its end."""
    run.wait_for(lambda: any(line["step"] >= step for line in run.passes()) or not run.is_alive())
    run.signal(signal.SIGTERM)
    run.wait()


def resumes(folder: Path, kind: str) -> Outcome:
    """Stops a run five times, and goes on each time with another number of workers.

    Args:
        kind: of the digits' source, see `sets.flags_of`.
    """
    whole = reference(folder / "whole", STEPS, **sets.flags_of(kind, folder))
    stopped = Run(folder / "stopped", whole.flags)
    for number, step in enumerate((*STOPS, None)):
        stopped.start(dataloader_num_workers=WORKERS[number % len(WORKERS)])
        if step is None:
            stopped.wait()
        else:
            stop_at(stopped, step)
    comparison = stopped.compared_with(whole)
    return Outcome(
        drill=f"five resumes, with 0, 2 and 4 workers by turns: {kind}",
        passed=comparison.equal,
        figures={"order": whole.order_hash(), "order after resumes": stopped.order_hash(), **compared([comparison])},
    )


def orders(folder: Path, world_sizes: tuple[int, ...], workers: tuple[int, ...]) -> Outcome:
    """The order of a streamed set by workers and processes, at one global batch."""
    flags = {"max_train_steps": STEPS_PER_EPOCH + 2, **sets.flags_of("streamed parquet", folder)}
    hashes = {}
    for num_processes, num_workers in product(world_sizes, workers):
        sizes = {"per_device_train_batch_size": GLOBAL_BATCH_SIZE // num_processes}
        sizes |= {"dataloader_num_workers": num_workers}
        run = Run(folder / f"{num_processes}-{num_workers}", {**flags, **sizes}, num_processes).finish()
        hashes[f"{num_processes} processes, {num_workers} workers each"] = run.order_hash()
    return Outcome(
        drill="the order of streamed samples, by processes and workers",
        passed=len(set(hashes.values())) == 1,
        figures={"different orders": len(set(hashes.values())), "order hash": hashes},
    )


def world_sizes(folder: Path) -> Outcome:
    """One process, then two, four and one again, at the same global batch."""
    whole = reference(folder / "whole", 48)
    changing = Run(folder / "changing", whole.flags)
    for step, num_processes in zip((12, 24, 36, None), (1, 2, 4, 1), strict=True):
        changing.num_processes = num_processes
        changing.start(per_device_train_batch_size=GLOBAL_BATCH_SIZE // num_processes)
        if step is None:
            changing.wait()
        else:
            stop_at(changing, step)
    comparison, difference = changing.compared_with(whole), largest_difference(whole, changing)
    return Outcome(
        drill="1, 2, 4 and 1 processes in turn, at one global batch",
        passed=comparison.same_order and difference < TOLERANCE,
        figures={
            "same samples, crops and noise": comparison.same_order,
            "samples lost": comparison.lost,
            "samples repeated": comparison.repeated,
            "largest difference of a loss": f"{difference:.1e}",
            "tolerance": f"{TOLERANCE:.0e}",
        },
    )


def largest_difference(one: Run, other: Run) -> float:
    """Of any loss of any step, relative to the loss or to 1, whichever is larger."""
    largest = 0.0
    for name in LOSSES:
        mine, theirs = one.series(name), other.series(name)
        if mine.keys() != theirs.keys():
            return math.inf
        largest = max(largest, *(abs(mine[step] - theirs[step]) / max(1, abs(mine[step])) for step in mine))
    return largest
