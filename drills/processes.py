"""Several processes: one is killed, one has no numbers, each has other losses, two runs want one folder."""

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from .apparatus.comparing import (
    GLOBAL_BATCH_SIZE,
    NO_CHANCE,
    SAVE_INTERVAL,
    compare,
    figures_of,
    gradient_difference,
    killed_once,
    largest_difference,
    reference,
)
from .apparatus.recording import Scaling
from .apparatus.runs import Run
from .order import TOLERANCE
from .outcome import Outcome

STEPS = 5 * SAVE_INTERVAL
HALF = GLOBAL_BATCH_SIZE // 2
LAST_STATE = f"checkpoint-{STEPS}/trainer_state.json"
BOUND = 60.0  # seconds in which the other process must have ended
GRADIENT_TOLERANCE = 1e-5  # of any tensor's gradient, relative to the norm of all
TWO = {"num_processes": 2, "per_device_train_batch_size": HALF}


def one_of_two_killed(folder: Path) -> Outcome:
    """Kills the second of two processes."""
    whole = reference(folder / "whole", STEPS, dataloader_num_workers=2, **TWO)
    killed = Run(folder / "killed", whole.flags, num_processes=2)
    killed.start()
    killed.wait_for_passes(2 * SAVE_INTERVAL + 2)
    os.kill(killed.processes[1].pid, signal.SIGKILL)
    died = time.monotonic()
    first, _ = killed.wait(BOUND)
    seconds, orphans = time.monotonic() - died, killed.orphans()
    comparison = compare(killed.finish(), whole)
    return Outcome(
        drill="one of two processes, of two workers each, killed",
        passed=first not in (0, None) and not orphans and comparison.equal,
        figures={
            "seconds to the other's end": round(seconds, 1),
            "bound in seconds": BOUND,
            "orphans": len(orphans),
            **figures_of([comparison]),
        },
    )


def one_worker_killed(folder: Path, steps: int) -> Outcome:
    """Kills a process that loads images, as a machine out of memory does, long before the run's end."""
    whole = reference(folder / "whole", steps, dataloader_num_workers=2)
    killed = Run(folder / "killed", whole.flags)
    killed.start()
    killed.wait_for_passes(2 * SAVE_INTERVAL)
    main = psutil.Process(killed.processes[0].pid)
    next(child for child in main.children() if child.cmdline() == main.cmdline()).kill()
    died = time.monotonic()
    codes = killed.wait(BOUND)
    seconds, orphans = time.monotonic() - died, killed.orphans()
    said = "has no batch for step" in killed.log()
    comparison, redone = compare(killed.finish(), whole), killed.record.most_redone()
    return Outcome(
        drill="one of two workers killed",
        passed=codes == [1] and said and redone == 0 and not orphans and comparison.equal,
        figures={
            "exit code": codes[0],
            "seconds to the end": round(seconds, 1),
            "steps lost": redone,
            "orphans": len(orphans),
            **figures_of([comparison]),
        },
    )


def not_a_number_on_one(folder: Path) -> Outcome:
    """Gives one of two processes pixels that are no numbers, then infinite ones."""
    runs = []
    for name, factor in (("nan", torch.nan), ("infinite", torch.inf)):
        run = Run(folder / name, {"max_train_steps": STEPS, "per_device_train_batch_size": HALF}, num_processes=2)
        runs.append(run.finish(scaling=Scaling(factor, first_image=HALF, steps=(7, 8))))
    finite = all(tensor.isfinite().all() for run in runs for tensor in run.weights().values())
    skipped = [int(max(run.series("skipped_steps").values())) for run in runs]
    same = all(run.record.weights_by_step(0) == run.record.weights_by_step(1) for run in runs)
    kept = all(
        run.record.weights_by_step(1)[step] == run.record.weights_by_step(1)[6] for run in runs for step in (7, 8)
    )
    return Outcome(
        drill="NaN, and Inf, on one of two processes in steps 7 and 8",
        passed=skipped == [2, 2] and finite and same and kept,
        figures={
            "steps skipped": skipped,
            "weights finite": bool(finite),
            "equal on both after each step": same,
            "and left as they were by these": kept,
        },
    )


def losses_on_two_sides_of_the_gate(folder: Path) -> Outcome:
    """Gives the second of two processes images of more contrast, so that its L_rec stays above the gate for longer."""
    options = {"scaling": Scaling(3.0, first_image=HALF)}
    flags = {"max_train_steps": STEPS, "norm_pix_loss": False, "mi_gate_threshold": 3.35, **NO_CHANCE}
    alone = Run(folder / "one", flags).finish(gradients=True, **options)
    two = Run(folder / "two", {**flags, "per_device_train_batch_size": HALF}, num_processes=2)
    two.finish(gradients=True, **options)
    losses = [{line["step"]: line["reconstruction_loss"] for line in two.record.passes(rank)} for rank in (0, 1)]
    straddling = sum(losses[0][step] < flags["mi_gate_threshold"] < losses[1][step] for step in losses[0])
    opened: list[Any] = [
        next((step for step, open in run.series("mi_active").items() if open), None) for run in (alone, two)
    ]
    same_gate = opened[0] == opened[1] and None not in opened
    difference = largest_difference(alone, two)
    of_gradient = gradient_difference(alone, two, step=opened[1]) if same_gate else math.inf
    return Outcome(
        drill="L_rec on two sides of the gate's threshold on two processes",
        passed=straddling > 1 and same_gate and max(difference, of_gradient) < TOLERANCE,
        figures={
            "steps in which they straddled it": straddling,
            "gate opened at step": opened[1],
            "by one process": opened[0],
            "largest difference of a loss": f"{difference:.1e}",
            "of the gradient in that step": f"{of_gradient:.1e}",
        },
    )


def gradients(folder: Path, world_sizes: tuple[int, ...], accumulations: tuple[int, ...]) -> Outcome:
    """The gradient of the first step, of several processes against one, with and without accumulation."""
    differences = {}
    for accumulation in accumulations:
        flags: dict[str, Any] = {"max_train_steps": 2, "gradient_accumulation_steps": accumulation, **NO_CHANCE}
        flags |= {"mi_gate_threshold": 100.0}  # open from the start
        alone, *others = (
            Run(
                folder / f"{number}-{accumulation}",
                {**flags, "per_device_train_batch_size": GLOBAL_BATCH_SIZE // number},
                number,
            ).finish(gradients=True)
            for number in (1, *world_sizes)
        )
        for other in others:
            name = f"processes: {other.num_processes}, accumulation: {accumulation}"
            differences[name] = gradient_difference(alone, other, step=1)
    return Outcome(
        drill="the first gradient of several processes against that of one, information terms on",
        passed=max(differences.values()) < GRADIENT_TOLERANCE,
        figures={
            "tolerance": f"{GRADIENT_TOLERANCE:.0e}",
            "relative difference": {name: f"{value:.1e}" for name, value in differences.items()},
        },
    )


def two_runs_in_one_folder(folder: Path) -> Outcome:
    """Starts a second run where one is alive, then where it was killed."""
    flags = {"max_train_steps": 1_000_000, "checkpointing_steps": SAVE_INTERVAL}
    first, second = Run(folder, flags), Run(folder, flags)
    first.start()
    first.wait_for_passes(2 * SAVE_INTERVAL)
    began = time.monotonic()
    second.start()
    codes = second.wait()
    seconds = time.monotonic() - began
    named = f"pid {first.processes[0].pid}" in second.log()
    first.kill()
    passes = first.record.num_passes()
    second.start()
    second.wait_for_passes(passes + 1)
    taken_over = second.is_alive() and second.record.num_passes() > passes
    second.kill()
    return Outcome(
        drill="two runs in one folder",
        passed=codes == [1] and named and taken_over,
        figures={
            "second refused after seconds, imports included": round(seconds, 1),
            "holder named": named,
            "a dead run's lock taken over": taken_over,
        },
    )


def in_bfloat16(folder: Path) -> Outcome:
    """A run under autocast, killed and resumed; it must not be the run in float32."""
    in_full = reference(folder / "float32", STEPS)
    whole = reference(folder / "whole", STEPS, mixed_precision="bf16")
    killed = killed_once(folder / "killed", whole, after=2 * SAVE_INTERVAL + 1)
    comparison = compare(killed, whole)
    in_float32 = all(
        tensor.dtype == torch.float32 for tensor in killed.weights().values() if tensor.is_floating_point()
    )
    return Outcome(
        drill="bf16 on a CPU, killed and resumed",
        passed=comparison.equal and in_float32 and not compare(whole, in_full).same_weights,
        figures={"weights in float32": in_float32, **figures_of([comparison])},
    )


def in_float16(folder: Path) -> Outcome:
    """A run on a GPU in float16 with a forced overflow, killed and resumed: the loss scaler goes on where it was."""
    drill = "fp16 on a GPU with a forced overflow, killed and resumed"
    if not torch.cuda.is_available():
        return Outcome(drill, passed=False, skipped="no GPU here")
    options = {"scaling": Scaling(torch.inf, first_image=0, steps=(6,))}
    flags = {
        "max_train_steps": STEPS,
        "checkpointing_steps": SAVE_INTERVAL,
        "mixed_precision": "fp16",
        "use_cpu": False,
    }
    whole = Run(folder / "whole", flags).finish(**options)
    killed = killed_once(folder / "killed", whole, after=2 * SAVE_INTERVAL + 1, **options)
    states = [json.loads((run.output_dir / LAST_STATE).read_text())["scaler"] for run in (whole, killed)]
    overflows = int(max(killed.series("skipped_steps").values()))
    return Outcome(
        drill,
        passed=states[0] == states[1] and overflows == 1,
        figures={"steps skipped": overflows, "scale at the end": states[1]["scale"], "equal": states[0] == states[1]},
    )
