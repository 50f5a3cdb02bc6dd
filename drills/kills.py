"""`kill -9` at random moments of a run and of its saves; stop signals."""

import random
import signal
import statistics
from pathlib import Path
from typing import Any

from mimae.training.checkpoints import verify

from .outcome import Outcome
from .recording import DeathInSave
from .runs import Run

SAVE_INTERVAL = 4  # steps


def reference(folder: Path, steps: int, num_processes: int = 1, **flags: Any) -> Run:
    """The run that nothing happens to."""
    flags = {"max_train_steps": steps, "checkpointing_steps": SAVE_INTERVAL, **flags}
    return Run(folder, flags, num_processes).finish()


def kills_in_a_run(folder: Path, kills: int, seed: int = 0) -> Outcome:
    """Kills a run at random moments, start and end of it included, and resumes it each time."""
    chance = random.Random(seed)
    steps = 2 * SAVE_INTERVAL * (kills + 1)
    whole = reference(folder / "whole", steps)
    killed = Run(folder / "killed", whole.flags)
    lost = recovered = 0
    for _ in range(kills):
        before, steps_to_do = killed.num_passes(), chance.randrange(3 * SAVE_INTERVAL)
        killed.start()
        killed.wait_for_passes(before + steps_to_do)
        killed.wait_a_while(chance.uniform(0, 0.02) if steps_to_do else chance.uniform(0, 5))
        killed.kill()
        killed.wait()
        lost += bool(checkpoints(killed)) and not valid_checkpoints(killed)
        recovered += killed.num_passes() > before or not steps_to_do
    killed.finish()
    return Outcome(
        drill="kill -9 at random moments of a run",
        passed=not lost and killed.equals(whole) and worst_redone(killed) <= SAVE_INTERVAL,
        figures={
            "kills": kills,
            "recovered": recovered,
            "checkpoints lost": lost,
            "equal": killed.equals(whole),
            "most steps redone": worst_redone(killed),
            "seconds from start to first step": round(statistics.median(seconds_to_first_step(killed)), 1),
        },
    )


def kills_in_saves(folder: Path, kills: int, seed: int = 0) -> Outcome:
    """Has a run kill itself at random moments of its saves, the rename and the rotation included."""
    chance = random.Random(seed)
    whole = reference(folder / "whole", 3 * SAVE_INTERVAL * (kills + 1), checkpoints_total_limit=2)
    killed = Run(folder / "killed", whole.flags)
    lost = died = 0
    for _ in range(kills):
        killed.start(death=DeathInSave(save=chance.choice([2, 3]), fraction=chance.uniform(0, 1)))
        died += killed.wait() == [-signal.SIGKILL]
        lost += not valid_checkpoints(killed)
    killed.finish()
    return Outcome(
        drill="kill -9 inside saves",
        passed=not lost and died == kills and killed.equals(whole),
        figures={"kills": died, "checkpoints lost": lost, "equal": killed.equals(whole)},
    )


def stop_signals(folder: Path) -> list[Outcome]:
    """SIGTERM and SIGUSR1 to the whole process group, workers included."""
    whole = reference(folder / "whole", 60, dataloader_num_workers=2)
    outcomes = []
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        stopped = Run(folder / signum.name, whole.flags)
        stopped.start()
        stopped.wait_for_passes(2 * SAVE_INTERVAL + 2)
        stopped.kill(signum)
        (code,) = stopped.wait()
        stopped.finish()
        outcomes.append(
            Outcome(
                drill=signum.name,
                passed=code == 128 + signum and worst_redone(stopped) == 0 and stopped.equals(whole),
                figures={"exit code": code, "steps lost": worst_redone(stopped), "equal": stopped.equals(whole)},
            )
        )
    return outcomes


def checkpoints(run: Run) -> list[Path]:
    """All that have a checkpoint's name."""
    return list(run.output_dir.glob("checkpoint-*"))


def valid_checkpoints(run: Run) -> list[Path]:
    """Those of which every byte is as it was written."""
    return [folder for folder in checkpoints(run) if not verify(folder)]


def worst_redone(run: Run) -> int:
    """The most steps that any start had to do once more."""
    worst = newest = 0
    start = -1
    for line in run.passes():
        if line["start"] != start:
            worst, start = max(worst, newest - line["step"] + 1), line["start"]
        newest = line["step"]
    return worst


def seconds_to_first_step(run: Run) -> list[float]:
    """Of each start that got so far, from when Python has imported all."""
    began: dict[int, float] = {}
    first: dict[int, float] = {}
    for line in run.lines():
        if "began" in line:
            began[line["start"]] = line["time"]
        elif "step" in line:
            first.setdefault(line["start"], line["time"])
    return [first[start] - began[start] for start in first]
