"""The pre-training script, recorded: what each step has seen, how long each save took. On demand it dies in a save.

    python -m mimae.drills.recording '{"folder": "records", "start": 0}' FLAGS…

A line of JSON is appended to `folder/<rank>.jsonl` for each forward pass and each save. It is written at once: what a
kill leaves is what was done before it.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mimae.run_mim_pretrain import main
from mimae.training.checkpoints import CheckpointStore
from mimae.training.trainer import Pretrainer


class DeathInSave(NamedTuple):
    """When a run kills itself: in which save since it was started, after which part of the time that a save takes."""

    save: int
    fraction: float


class NotANumber(NamedTuple):
    """Where a run is given pixels that are none: in the forward passes of these steps, on this rank alone."""

    steps: list[int]
    rank: int


class Recorder:
    """Appends to the record of one process.

    Args:
        folder: of the record; made if need be.
        start: how often the run was started before.
        rank: of the process.
    """

    def __init__(self, folder: Path, start: int, rank: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.start, self.rank = start, rank
        self._descriptor = os.open(folder / f"{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, **line: Any) -> None:
        """One system call: a line is there whole, or not at all."""
        line |= {"start": self.start, "time": time.time()}
        os.write(self._descriptor, f"{json.dumps(line)}\n".encode())


def record_steps(recorder: Recorder, trouble: NotANumber | None) -> None:
    """Makes the trainer of this process tell the recorder what it sees, and gives it the trouble asked for."""
    forward_backward = Pretrainer._forward_backward

    @wraps(forward_backward)
    def recorded(trainer: Pretrainer, batch: dict[str, Any]) -> torch.Tensor:
        step = trainer.progress.step + 1
        normalize = trainer.normalize
        if trouble is not None and recorder.rank == trouble.rank and step in trouble.steps:
            trainer.normalize = lambda images: torch.full_like(normalize(images), torch.nan)
        try:
            result = forward_backward(trainer, batch)
        finally:
            trainer.normalize = normalize
        recorder.write(
            step=step,
            epoch=int(batch["epoch"][0]),
            index=batch["index"].tolist(),
            noise=[digest(each) for each in batch["noise"]],
            pixels=[digest(each) for each in batch["pixel_values"]],
        )
        return result

    Pretrainer._forward_backward = recorded


def digest(tensor: torch.Tensor) -> str:
    """Twelve digits that tell it from others."""
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:12]


def record_saves(recorder: Recorder, death: DeathInSave | None) -> None:
    """Makes the checkpoints of this process tell the recorder how long each took, and kills it in one if asked."""
    save, durations = CheckpointStore.save, []

    @wraps(save)
    def recorded(store: CheckpointStore, step: int, write: Callable[[Path], None]) -> Path:
        if death is not None and len(durations) + 1 == death.save:
            die_after(death.fraction * max(durations))
        started = time.perf_counter()
        folder = save(store, step, write)
        durations.append(time.perf_counter() - started)
        recorder.write(saved=step, seconds=durations[-1])
        return folder

    CheckpointStore.save = recorded


def die_after(seconds: float) -> None:
    """`kill -9` of this process, from a thread beside whatever it does then."""

    def die() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=die, daemon=True).start()


def run(argv: list[str]) -> int:
    """Runs the script with what is to be recorded in front of its flags."""
    options = json.loads(argv[0])
    recorder = Recorder(Path(options["folder"]), options["start"], int(os.environ.get("RANK", "0")))
    recorder.write(began=os.getpid())
    record_steps(recorder, NotANumber(**options["trouble"]) if options.get("trouble") else None)
    record_saves(recorder, DeathInSave(**options["death"]) if options.get("death") else None)
    return main(argv[1:])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
