"""Resumes with other workers, on other sources, by other numbers of processes: the same samples in the same order."""

import math
import signal
from pathlib import Path
from typing import Any

from .kills import reference
from .outcome import Outcome
from .runs import Run

STEPS_PER_EPOCH = 22  # of 64 of the 1,437 training digits
# three in one epoch, across an epoch's end, in the third epoch
STOPS = (5, 9, 17, STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH + 7)
STEPS = 3 * STEPS_PER_EPOCH
WORKERS = (0, 2, 4, 0, 2, 4)
LOSSES = ("reconstruction_loss", "mi_max_loss", "mi_min_loss", "approximation_loss")


def stop_at(run: Run, step: int) -> None:
    """Waits for a step, asks the run to stop and waits for its end."""
    run.wait_for(lambda: any(line["step"] >= step for line in run.passes()) or not run.is_alive())
    run.kill(signal.SIGTERM)
    run.wait()


def resumes(folder: Path, source: str, flags: dict[str, Any]) -> Outcome:
    """Stops a run five times, and goes on each time with another number of workers.

    Args:
        source: what is read, in words.
        flags: that name it.
    """
    whole = reference(folder / "whole", STEPS, **flags)
    stopped = Run(folder / "stopped", whole.flags)
    for step, workers in zip((*STOPS, None), WORKERS, strict=True):
        stopped.start(dataloader_num_workers=workers)
        if step is None:
            stopped.wait()
        else:
            stop_at(stopped, step)
    return Outcome(
        drill=f"five resumes, 0, 2 and 4 workers by turns, {source}",
        passed=stopped.equals(whole),
        figures={
            "order": whole.order_hash(),
            "order of the resumed": stopped.order_hash(),
            "equal": stopped.equals(whole),
        },
    )


def world_sizes(folder: Path) -> Outcome:
    """One process, then two, four and one again, at the same global batch."""
    whole = reference(folder / "whole", STEPS)
    changing = Run(folder / "changing", whole.flags)
    for step, num_processes in zip((12, 24, 36, None), (1, 2, 4, 1), strict=True):
        changing.num_processes = num_processes
        changing.start(per_device_train_batch_size=64 // num_processes)
        if step is None:
            changing.wait()
        else:
            stop_at(changing, step)
    difference = largest_difference(whole, changing)
    return Outcome(
        drill="1, 2, 4 and 1 processes at one global batch",
        passed=changing.seen() == whole.seen() and difference < 1e-3,
        figures={
            "order": whole.order_hash(),
            "order of the other": changing.order_hash(),
            "largest relative difference of a loss": f"{difference:.1e}",
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
