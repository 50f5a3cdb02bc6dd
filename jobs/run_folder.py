"""The folder of a run: its path, its lock, and what it may contain when a run begins."""

import fcntl
import os
import re
import shutil
import socket
from pathlib import Path

from ..training.checkpoints.store import CheckpointStore

# what a run leaves behind; nothing else is ever deleted
RUN_FILES = (
    *("metrics.jsonl", "bad_images.jsonl", "results.json"),
    *("README.md", "config.json", "model.safetensors", "preprocessor_config.json"),
    *("curves.png", "reconstructions.png", "confusion_matrix.png", "features.png", "predictions.png"),
)
RUN_FOLDERS = ("reconstructions", "tensorboard", "runs")
LOCK_NAME = ".lock"


class OutputDirNotEmptyError(ValueError):
    """The output folder holds another run, or a model."""


class OutputDirInUseError(RuntimeError):
    """Another live process trains into the same folder."""


def claim_output_dir(requested: str | None, recipe: Path, overwrite: bool, resume: bool) -> Path:
    """The folder of this run, locked; call it on one process only.

    Args:
        requested: --output_dir; None = `outputs/<run_name>`, or the first of `outputs/<run_name>-2`, … that is free.
        overwrite: the run in the folder may be deleted; `clear_output_dir` does so once all else is ready.
        resume: or it may be continued.

    Raises:
        OutputDirNotEmptyError: the folder holds a run, and neither `overwrite` nor `resume` says what to do with it.
        OutputDirInUseError: a live process has it.
        ValueError: `resume` without a folder.
    """
    if requested is None and resume:
        raise ValueError("--resume_from_checkpoint needs --output_dir, the folder of the run to go on with")
    folder = Path(requested) if requested else _first_free(Path("outputs") / run_name(recipe))
    lock_output_dir(folder)
    CheckpointStore(folder, total_limit=None).remove_partials()
    if holds_run(folder) and not overwrite and not resume:
        raise OutputDirNotEmptyError(
            f"{folder} holds another run, or a model. Go on with it: --resume_from_checkpoint latest; delete it: "
            "--overwrite_output_dir; or choose another --output_dir"
        )
    return folder


def run_name(recipe: Path) -> str:
    """A recipe's name with its folder's, "fashion_mnist-mimae": by itself it might be the package's, and hide it."""
    folder = recipe.resolve().parent.name
    return recipe.stem if folder == "recipes" else f"{folder}-{recipe.stem}"


def clear_output_dir(folder: Path) -> None:
    """Deletes the run that a folder holds, if it holds one, and nothing else in it; call it on one process only."""
    if not holds_run(folder):
        return
    for path in (*_checkpoints(folder), *(folder / name for name in RUN_FOLDERS)):
        shutil.rmtree(path, ignore_errors=True)
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)


def holds_run(folder: Path) -> bool:
    """Whether a run has begun here, or a model lies here."""
    signs = ("metrics.jsonl", "results.json", "config.json")
    return any((folder / name).exists() for name in signs) or bool(_checkpoints(folder))


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.is_dir() and re.fullmatch(r"\D+-\d+", path.name)]


def _first_free(folder: Path) -> Path:
    candidate, number = folder, 2
    while holds_run(candidate):
        candidate, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return candidate


def lock_output_dir(output_dir: Path) -> None:
    """Takes a folder, made if need be, for one run until the process ends.

    A POSIX record lock: the kernel drops it with the process that holds it, however that ends, and worker processes
    do not inherit it. Its price: it is the process that holds it, so it does not separate two runs in one process, and
    closing any other handle on `.lock` in that process drops it.

    Raises:
        OutputDirInUseError: a live process has it; the message names its pid and host.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    # A bare descriptor: a file object would drop the lock when it is garbage.
    descriptor = os.open(output_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        holder = os.read(descriptor, 1000).decode() or "a process that has not yet written its pid"
        os.close(descriptor)
        raise OutputDirInUseError(
            f"{output_dir} is in use by {holder}: wait for it to end, end it, or choose another --output_dir"
        ) from error
    os.truncate(descriptor, 0)
    os.write(descriptor, f"pid {os.getpid()} on host {socket.gethostname()}".encode())
