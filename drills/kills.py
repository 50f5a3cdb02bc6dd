"""`kill -9` at random moments of a run and of its saves; stop signals."""

import random
import signal
import statistics
from pathlib import Path
from typing import Any

from mimae.training.checkpoints import verify

from .outcome import Outcome, compared
from .recording import DeathInSave
from .runs import Run

SAVE_INTERVAL = 4  # steps
KILLED = -signal.SIGKILL


def reference(folder: Path, steps: int, num_processes: int = 1, **flags: Any) -> Run:
    """The run that nothing happens to."""
    flags = {"max_train_steps": steps, "checkpointing_steps": SAVE_INTERVAL, **flags}
    return Run(folder, flags, num_processes).finish()


def kills_in_a_run(folder: Path, kills: int, seed: int = 0) -> Outcome:
    """Kills a run at random moments, its start included, and resumes it each time.

    A kill counts as recovered unless the start after it ended by itself.
    """
    chance = random.Random(seed)
    whole = reference(folder / "whole", 2 * SAVE_INTERVAL * (kills + 1))
    killed = Run(folder / "killed", whole.flags)
    lost = failed = 0
    for _ in range(kills):
        before, steps_to_do = killed.num_passes(), chance.randrange(3 * SAVE_INTERVAL)
        killed.start()
        killed.wait_for_passes(before + steps_to_do)
        killed.wait_a_while(chance.uniform(0, 0.02) if steps_to_do else chance.uniform(0, 5))
        failed += killed.kill() != [KILLED]
        lost += bool(checkpoints(killed)) and not valid_checkpoints(killed)
    killed.finish()
    comparison = killed.compared_with(whole)
    return Outcome(
        drill="kill -9 at random moments of a run",
        passed=not lost and not failed and comparison.equal and most_redone(killed) <= SAVE_INTERVAL,
        figures={
            "kills": kills,
            "recovered": kills - failed,
            "checkpoints lost": lost,
            "save interval in steps": SAVE_INTERVAL,
            "most steps redone": most_redone(killed),
            "seconds from resume to first step (median)": round(statistics.median(seconds_to_first_step(killed)), 1),
            **compared([comparison]),
        },
    )


def kills_in_saves(folder: Path, kills: int, seed: int = 0) -> Outcome:
    """Has a run kill itself in its saves: by turns at a random time, and before a random file operation."""
    chance = random.Random(seed)
    whole = reference(folder / "whole", 3 * SAVE_INTERVAL * (kills + 1), checkpoints_total_limit=2)
    killed = Run(folder / "killed", whole.flags)
    lost = failed = 0
    for number in range(kills):
        death = DeathInSave(chance.choice([2, 3]), chance.uniform(0, 1), by_operation=number % 2 == 0)
        killed.start(death=death)
        failed += killed.wait() != [KILLED]
        lost += not valid_checkpoints(killed)
    inside = deaths_inside_saves(killed)
    killed.finish()
    comparison = killed.compared_with(whole)
    return Outcome(
        drill="kill -9 inside saves, the rename and the rotation included",
        passed=not lost and not failed and comparison.equal,
        figures={
            "kills": kills,
            "recovered": kills - failed,
            "of these inside a save": inside,
            "checkpoints lost": lost,
            **compared([comparison]),
        },
    )


def stop_signals(folder: Path) -> list[Outcome]:
    """SIGTERM and SIGUSR1 to the whole process group, workers included."""
    whole = reference(folder / "whole", 8 * SAVE_INTERVAL, dataloader_num_workers=2)
    outcomes = []
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        stopped = Run(folder / signum.name, whole.flags)
        stopped.start()
        stopped.wait_for_passes(2 * SAVE_INTERVAL + 2)
        stopped.signal(signum)
        (code,) = stopped.wait()
        stopped.finish()
        comparison, redone = stopped.compared_with(whole), most_redone(stopped)
        outcomes.append(
            Outcome(
                drill=f"{signum.name} to a run with two workers",
                passed=code == 128 + signum and redone == 0 and comparison.equal,
                figures={"exit code": code, "steps lost": redone, **compared([comparison])},
            )
        )
    return outcomes


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


def checkpoints(run: Run) -> list[Path]:
    """All that have a checkpoint's name."""
    return list(run.output_dir.glob("checkpoint-*"))


def valid_checkpoints(run: Run) -> list[Path]:
    """Those of which every byte is as it was written."""
    return [folder for folder in checkpoints(run) if not verify(folder)]


def most_redone(run: Run) -> int:
    """The most steps that any start had to do once more."""
    most = newest = 0
    start = -1
    for line in run.passes():
        if line["start"] != start:
            most, start = max(most, newest - line["step"] + 1), line["start"]
        newest = line["step"]
    return most


def deaths_inside_saves(run: Run) -> int:
    """How many starts have begun a save that they did not end."""
    last = {line["start"]: line for line in run.lines()}
    return sum("saving" in line for line in last.values())


def seconds_to_first_step(run: Run) -> list[float]:
    """Of each resume that got so far, from the launch of Python to the end of the first forward and backward pass."""
    first: dict[int, float] = {}
    for line in run.passes():
        first.setdefault(line["start"], line["time"])
    return [moment - run.started[start] for start, moment in first.items() if start > 0]
