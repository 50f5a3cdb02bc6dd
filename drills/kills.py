"""`kill -9` at random moments of a run and of its saves; stop signals."""

import random
import signal
import statistics
from pathlib import Path

from .apparatus.comparing import SAVE_INTERVAL, compare, figures_of, reference
from .apparatus.recording import DeathInSave
from .apparatus.runs import Run
from .outcome import Outcome

KILLED = -signal.SIGKILL


def kills_in_a_run(folder: Path, kills: int, seed: int = 0) -> Outcome:
    """Kills a run at random moments, its start and its evaluations included, and resumes it each time.

    All kills are recovered if no start ends by itself before the last, and that one ends well.
    """
    chance = random.Random(seed)
    steps = 2 * SAVE_INTERVAL * (kills + 1)
    whole = reference(folder / "whole", steps, evaluation_steps=3 * SAVE_INTERVAL, probe_samples=64, logging_steps=3)
    killed = Run(folder / "killed", whole.flags)
    lost = failed = 0
    for _ in range(kills):
        before, steps_to_do = killed.record.num_passes(), chance.randrange(3 * SAVE_INTERVAL)
        killed.start()
        killed.wait_for_passes(before + steps_to_do)
        killed.wait_a_while(chance.uniform(0, 0.02) if steps_to_do else chance.uniform(0, 5))
        failed += killed.kill() != [KILLED]
        lost += bool(killed.checkpoints()) and not killed.valid_checkpoints()
    killed.finish()
    comparison = compare(killed, whole)
    return Outcome(
        drill="kill -9 at random moments of a run",
        passed=not lost and not failed and comparison.equal and killed.record.most_redone() <= SAVE_INTERVAL,
        figures={
            "kills": kills,
            "recovered": kills - failed,
            "of these before the first step": kills + 1 - len(killed.record.first_passes()),
            "checkpoints lost": lost,
            "steps between saves": SAVE_INTERVAL,
            "most steps redone": killed.record.most_redone(),
            "seconds from resume to first step (median)": round(statistics.median(seconds_to_first_step(killed)), 1),
            **figures_of([comparison]),
        },
    )


def kills_in_saves(folder: Path, kills: int, seed: int = 0) -> Outcome:
    """Has a run kill itself in its saves: by turns at a random time, and before a random file operation."""
    chance = random.Random(seed)
    whole = reference(folder / "whole", 3 * SAVE_INTERVAL * (kills + 1), checkpoints_total_limit=2)
    killed = Run(folder / "killed", whole.flags)
    failed, left = 0, []
    for number in range(kills):
        death = DeathInSave(chance.choice([2, 3]), chance.uniform(0, 1), by_operation=number % 2 == 0)
        killed.start(death=death)
        failed += killed.wait() != [KILLED]
        left.append(len(killed.valid_checkpoints()))
    inside = killed.record.deaths_inside_saves()
    killed.finish()
    comparison = compare(killed, whole)
    return Outcome(
        drill="kill -9 inside saves, the rename and the rotation included",
        # the first death may come when there is but one
        passed=not failed and inside == kills and left[0] > 0 and min(left[1:]) >= 2 and comparison.equal,
        figures={
            "kills": kills,
            "recovered": kills - failed,
            "inside a save": inside,
            "checkpoints lost": left.count(0),
            "valid ones after each kill, at least": min(left[1:]),
            **figures_of([comparison]),
        },
    )


def stop_signal(folder: Path, name: str) -> Outcome:
    """SIGTERM or SIGUSR1 to the whole process group, workers included."""
    signum = signal.Signals[name]
    whole = reference(folder / "whole", 8 * SAVE_INTERVAL, dataloader_num_workers=2)
    stopped = Run(folder / "stopped", whole.flags)
    stopped.start()
    stopped.wait_for_passes(2 * SAVE_INTERVAL + 2)
    stopped.send(signum)
    (code,) = stopped.wait()
    comparison, redone = compare(stopped.finish(), whole), stopped.record.most_redone()
    return Outcome(
        drill=f"{name} to a run with two workers",
        passed=code == 128 + signum and redone == 0 and comparison.equal,
        figures={"exit code": code, "steps lost": redone, **figures_of([comparison])},
    )


def seconds_to_first_step(run: Run) -> list[float]:
    """Of each resume that got so far, from the launch of Python to the end of the first forward and backward pass."""
    return [moment - run.started[start] for start, moment in run.record.first_passes().items() if start > 0]
