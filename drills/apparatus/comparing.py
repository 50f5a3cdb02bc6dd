"""A run beside the one that nothing happened to."""

import math
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .runs import Run

SAVE_INTERVAL = 4  # steps
GLOBAL_BATCH_SIZE = 64
STEPS_PER_EPOCH = 22  # of 64 of the 1,437 digits
NO_CHANCE = {"drop_path_rate": 0}  # each process draws its own: several are to be as one
LOSSES = ("reconstruction_loss", "mi_max_loss", "mi_min_loss", "approximation_loss")


class Comparison(NamedTuple):
    """What was found.

    Args:
        lost, repeated: samples of an epoch that counted less often, or more often.
        same_order: whether every step saw the same samples, crops and noise.
        same_weights: whether the final weights are the same bits.
        same_metrics: whether the same was logged, line for line, evaluations too, timings aside.
    """

    lost: int
    repeated: int
    same_order: bool
    same_weights: bool
    same_metrics: bool

    @property
    def equal(self) -> bool:
        """Whether nothing tells them apart."""
        return self.same_order and self.same_weights and self.same_metrics


def compare(run: Run, whole: Run) -> Comparison:
    """Both must be finished."""
    mine, theirs = (Counter(each.record.samples()) for each in (run, whole))
    my_weights, their_weights = run.weights(), whole.weights()
    same_weights = my_weights.keys() == their_weights.keys() and all(
        torch.equal(my_weights[name], their_weights[name]) for name in my_weights
    )
    return Comparison(
        lost=(theirs - mine).total(),
        repeated=(mine - theirs).total(),
        same_order=run.record.seen() == whole.record.seen(),
        same_weights=same_weights,
        same_metrics=run.metrics() == whole.metrics(),
    )


def figures_of(comparisons: Sequence[Comparison]) -> dict[str, int]:
    """The figures that say whether runs were equal."""
    return {
        "runs compared": len(comparisons),
        "runs equal": sum(each.equal for each in comparisons),
        "samples lost": sum(each.lost for each in comparisons),
        "samples repeated": sum(each.repeated for each in comparisons),
    }


def reference(folder: Path, steps: int, num_processes: int = 1, **flags: Any) -> Run:
    """The run that nothing happens to."""
    flags = {"max_train_steps": steps, "checkpointing_steps": SAVE_INTERVAL, **flags}
    return Run(folder, flags, num_processes).finish()


def killed_once(folder: Path, whole: Run, after: int, **options: Any) -> Run:
    """The same run, killed after so many forward passes, and resumed.

    Args:
        options: of `Run.start`, both times.
    """
    killed = Run(folder, whole.flags, whole.num_processes)
    killed.start(**options)
    killed.wait_for_passes(after)
    killed.kill()
    return killed.finish(**options)


def stop_at(run: Run, step: int, **options: Any) -> None:
    """Starts a run, asks it to stop after a step, and waits for its end. Raises: RuntimeError if it ends otherwise.

    Args:
        options: of `Run.start`.
    """
    run.start(**options)
    run.wait_for(lambda: any(line["step"] >= step for line in run.record.passes()) or not run.is_alive())
    run.send(signal.SIGTERM)
    if set(codes := run.wait()) != {128 + signal.SIGTERM}:
        raise RuntimeError(f"{run.folder} was asked to stop and ended with {codes}:\n{run.log()[-4000:]}")


def largest_difference(one: Run, other: Run) -> float:
    """Of any loss of any step, relative to the loss or to 1, whichever is larger."""
    largest = 0.0
    for name in LOSSES:
        mine, theirs = one.series(name), other.series(name)
        if mine.keys() != theirs.keys():
            return math.inf
        largest = max(largest, *(abs(mine[step] - theirs[step]) / max(1, abs(mine[step])) for step in mine))
    return largest


def gradient_difference(one: Run, other: Run, step: int) -> float:
    """Of the gradient of any tensor, relative to the norm of all."""
    mine, theirs = one.gradient(step), other.gradient(step)
    if mine.keys() != theirs.keys():
        return math.inf
    whole = torch.cat([tensor.flatten() for tensor in mine.values()]).norm()
    return max(((mine[name] - theirs[name]).norm() / whole).item() for name in mine)
