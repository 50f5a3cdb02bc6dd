"""Several processes: one is killed, one has no numbers, two want one folder."""

import os
import signal
import time
from pathlib import Path

import torch

from .kills import SAVE_INTERVAL, reference
from .outcome import Outcome
from .recording import NotANumber
from .runs import Run

STEPS = 10 * SAVE_INTERVAL
BOUND = 60.0  # seconds in which the other process must have ended


def one_of_two_killed(folder: Path) -> Outcome:
    """Kills the second of two processes, started by torch's launcher as by accelerate's."""
    whole = reference(folder / "whole", STEPS, num_processes=2, per_device_train_batch_size=32)
    killed = Run(folder / "killed", whole.flags, num_processes=2)
    killed.start()
    killed.wait_for_passes(2 * SAVE_INTERVAL + 2)
    second = next(line["began"] for line in killed.lines(1) if "began" in line)
    os.kill(second, signal.SIGKILL)
    died = time.monotonic()
    killed.wait(BOUND)
    seconds = time.monotonic() - died
    orphans = killed.survivors()
    killed.finish()
    return Outcome(
        drill="one of two processes killed",
        passed=not orphans and killed.equals(whole),
        figures={"seconds to the other's end": round(seconds, 1), "orphans": orphans, "equal": killed.equals(whole)},
    )


def not_a_number_on_one(folder: Path) -> Outcome:
    """Gives one of two processes pixels that are no numbers, twice."""
    troubled = Run(
        folder / "run",
        {"max_train_steps": STEPS, "checkpointing_steps": SAVE_INTERVAL, "per_device_train_batch_size": 32},
        num_processes=2,
    )
    troubled.start(trouble=NotANumber(steps=[7, 8], rank=1))
    codes = troubled.wait()
    finite = all(tensor.isfinite().all() for tensor in troubled.weights().values())
    skipped = max(troubled.series("skipped_steps").values())
    return Outcome(
        drill="NaN on one of two processes, in two steps",
        passed=codes == [0, 0] and skipped == 2 and finite,
        figures={"steps skipped": int(skipped), "weights finite": finite},
    )


def two_runs_in_one_folder(folder: Path) -> Outcome:
    """Starts a second run where one is alive, then where it was killed."""
    flags = {"max_train_steps": 1_000_000, "checkpointing_steps": SAVE_INTERVAL}
    first, second = Run(folder, flags), Run(folder, {**flags, "max_train_steps": 1_000_000})
    first.start()
    first.wait_for_passes(2 * SAVE_INTERVAL)
    began = time.monotonic()
    second.start()
    codes = second.wait()
    seconds = time.monotonic() - began
    named = f"pid {first.processes[0].pid}" in second.log()
    first.kill()
    first.wait()
    passes = first.num_passes()
    second.start()
    second.wait_for_passes(passes + 1)
    taken_over = second.num_passes() > passes
    second.kill()
    second.wait()
    return Outcome(
        drill="two runs in one folder",
        passed=codes == [1] and named and taken_over,
        figures={"refused after seconds": round(seconds, 1), "holder named": named, "taken over": taken_over},
    )


def in_bfloat16(folder: Path) -> Outcome:
    """A run under autocast, killed and resumed."""
    whole = reference(folder / "whole", STEPS, mixed_precision="bf16")
    killed = Run(folder / "killed", whole.flags)
    killed.start()
    killed.wait_for_passes(3 * SAVE_INTERVAL + 1)
    killed.kill()
    killed.wait()
    killed.finish()
    dtypes = {str(tensor.dtype) for tensor in killed.weights().values() if tensor.is_floating_point()}
    return Outcome(
        drill="bf16, killed and resumed",
        passed=killed.equals(whole) and dtypes == {str(torch.float32)},
        figures={"equal": killed.equals(whole)},
    )
