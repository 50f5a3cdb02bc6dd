"""Damaged checkpoints: each file in each way."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mimae.training.checkpoints.store import CheckpointStore, verify

from .apparatus.comparing import SAVE_INTERVAL, Comparison, compare, figures_of, reference
from .apparatus.runs import Run
from .outcome import Outcome

STEPS = 5 * SAVE_INTERVAL


def truncate(path: Path) -> None:
    """The last byte is gone."""
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path: Path) -> None:
    """One bit in the middle is another."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    """No byte is left."""
    os.truncate(path, 0)


def zero_the_tail(path: Path) -> None:
    """The last page is zeros, as after a power cut."""
    content = path.read_bytes()
    kept = max(0, len(content) - 4096)
    path.write_bytes(content[:kept] + bytes(len(content) - kept))


DAMAGES: tuple[Callable[[Path], None], ...] = (truncate, flip_a_bit, empty, zero_the_tail, Path.unlink)

FILES = ("model.safetensors", "optimizer.safetensors", "trainer_state.json", "process_0.safetensors", "manifest.json")


def damage_to_each_file(folder: Path) -> Outcome:
    """Damages every file of the newest checkpoint in every way, one at a time; then a run resumes past each way."""
    whole = reference(folder / "whole", STEPS)
    store = CheckpointStore(whole.output_dir)
    newest: Any = store.latest()
    older = whole.output_dir / f"checkpoint-{STEPS - SAVE_INTERVAL}"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    injected = detected = 0
    for path in files:
        content = path.read_bytes()
        for damage in DAMAGES:
            damage(path)
            injected += 1
            detected += bool(verify(newest)) and store.latest() == older
            path.write_bytes(content)
    resumed = [
        resumed_past(damage, name, whole, folder / damage.__name__)
        for damage, name in zip(DAMAGES, FILES, strict=True)
    ]
    said = sum(was_said for was_said, _ in resumed)
    figures = figures_of([comparison for _, comparison in resumed])
    return Outcome(
        drill="every file of a checkpoint truncated, bit-flipped, emptied, its tail zeroed, removed, one at a time",
        passed=injected == detected and said == len(DAMAGES) == figures["runs equal"],
        figures={"files": len(files), "corruptions injected": injected, "corruptions detected": detected}
        | {"resumes that said so": said, **figures},
    )


def resumed_past(damage: Callable[[Path], None], name: str, whole: Run, folder: Path) -> tuple[bool, Comparison]:
    """A real run whose newest checkpoint is damaged goes on from the one before: whether it said so, how it ended."""
    shutil.copytree(whole.folder, folder)
    damaged = Run(folder, whole.flags)
    damaged.started = list(whole.started)
    newest = damaged.output_dir / f"checkpoint-{STEPS}"
    damage(newest / name)
    damaged.finish()
    return f"passing over the damaged checkpoint {newest}" in damaged.log(), compare(damaged, whole)
