"""A full disk, and files that would like to be executed or to be written elsewhere."""

import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mimae.training.checkpoints.store import seal

from .apparatus import sets
from .apparatus.comparing import GLOBAL_BATCH_SIZE, SAVE_INTERVAL, compare, figures_of, reference
from .apparatus.runs import Run
from .outcome import Outcome

STEPS = 6 * SAVE_INTERVAL
CHECKPOINTS_THAT_FIT = 2.5  # so that the third does not


def full_disk(folder: Path) -> Outcome:
    """Two processes train into a small file system of its own; it is made larger, and they resume."""
    drill = "disk full during a save of two processes"
    whole = reference(folder / "whole", STEPS, num_processes=2, per_device_train_batch_size=GLOBAL_BATCH_SIZE // 2)
    checkpoint = whole.output_dir / f"checkpoint-{STEPS}"
    size = sum(path.stat().st_size for path in checkpoint.rglob("*"))
    filled = Run(folder / "filled", whole.flags, num_processes=2)
    filled.output_dir.mkdir()
    try:
        mount(filled.output_dir, int(CHECKPOINTS_THAT_FIT * size))
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).splitlines()[0]
        return Outcome(drill, passed=False, skipped=f"no file system can be mounted here: {reason}")
    try:
        filled.start()
        codes = filled.wait()
        said = (
            f"could not write {filled.output_dir / 'checkpoint-'}" in filled.log() and "No space left" in filled.log()
        )
        valid, partial = filled.valid_checkpoints(), list(filled.output_dir.glob(".*.partial"))
        mount(filled.output_dir, 10 * size, "remount")
        comparison = compare(filled.finish(), whole)
    finally:
        subprocess.run(["umount", "--lazy", filled.output_dir], check=True)
    return Outcome(
        drill,
        passed=codes == [1, 1] and said and len(valid) == 2 and not partial and comparison.equal,
        figures={
            "exit codes": codes,
            "said so": said,
            "older checkpoints valid": len(valid),
            "partial ones left": len(partial),
            **figures_of([comparison]),
        },
    )


def mount(folder: Path, size: int, *options: str) -> None:
    """A file system of `size` bytes in memory. Raises: CalledProcessError, FileNotFoundError."""
    command = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "mimae-drill", str(folder)]
    subprocess.run(command, check=True, capture_output=True, text=True)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, traces: Path):
        self._traces = traces

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self._traces,)


def files_that_execute(folder: Path) -> Outcome:
    """A pickle in a checkpoint, among its files and in place of one; a pickle as a model; a YAML tag in a recipe."""
    traces, refused = folder / "executed", 0
    pickled = pickle.dumps(Trap(traces))
    pickle.loads(pickled)
    can_execute = traces.exists()  # else there would be nothing to refuse
    traces.unlink()

    whole = reference(folder / "run", 2 * SAVE_INTERVAL)
    newest = whole.output_dir / f"checkpoint-{2 * SAVE_INTERVAL}"
    (newest / "optimizer.pt").write_bytes(pickled)
    whole.finish()  # beside the files of a checkpoint it is no matter
    (newest / "optimizer.safetensors").write_bytes(pickled)
    seal(newest)  # as whoever put it there would do
    refused += ends_with_an_error(whole, "optimizer.safetensors is no readable safetensors file")

    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_bytes((whole.output_dir / "config.json").read_bytes())
    (model / "pytorch_model.bin").write_bytes(pickled)
    refused += ends_with_an_error(Run(folder / "warm", {**whole.flags, "model_name_or_path": model}), "weights_only")

    recipe = folder / "recipe.yaml"
    recipe.write_text(f'seed: !!python/object/apply:os.system ["touch {traces}"]\n')
    refused += ends_with_an_error(Run(folder / "tagged", whole.flags, recipe=recipe), "python/object/apply")
    return Outcome(
        drill="a pickle in a checkpoint and as a model, a YAML tag in a recipe",
        passed=can_execute and refused == 3 and not traces.exists(),
        figures={"refused": refused, "of": 3, "executed": int(traces.exists())},
    )


def ends_with_an_error(run: Run, words: str) -> bool:
    """Whether it ends with exit code 1 and says why."""
    run.start()
    return run.wait() == [1] and words in run.log()


def names_that_climb(folder: Path) -> Outcome:
    """Archives whose members have names that lead out of them, streamed and converted."""
    images = sets.encoded_digits()
    names = [f"../../outside-{number}.png" for number in range(len(images))]
    names[::2] = [f"{folder}/outside-{number}.png" for number in range(0, len(images), 2)]
    shards = folder / "a" / "b" / "c" / "shards"
    shards.mkdir(parents=True)
    sets.write_tar(shards / "train-0.tar", dict(zip(names, images, strict=True)))
    flags = {"data_files": shards / "*.tar", "cache_dir": folder / "a" / "b" / "c" / "cache", "max_train_steps": 2}
    for streaming in (True, False):
        Run(folder / f"run-{streaming}", {**flags, "streaming": streaming}).finish()
    outside = list(folder.rglob("outside-*"))
    return Outcome(
        drill="an archive of names with ../ and absolute ones, streamed and converted",
        passed=not outside,
        figures={"members": len(names), "written outside": len(outside)},
    )
