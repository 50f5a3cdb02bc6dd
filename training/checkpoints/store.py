"""Checkpoints that survive a kill, a full disk and a flipped bit, and one run per output folder.

A checkpoint is a folder `checkpoint-{step}` of safetensors and JSON files, with a `manifest.json` that holds the size
and the SHA-256 of every other file in it. It is written under a hidden name, brought to the disk, and gets its own
name in one rename: whatever has that name was once complete. The manifest shows whether it still is.
"""

import logging
import os
import re
import shutil
from collections.abc import Callable
from hashlib import file_digest
from pathlib import Path
from typing import Any

from .files import CheckpointError, read_json, write_json

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"


class CheckpointStore:
    """The checkpoints of one run: `output_dir/checkpoint-{step}`, written by one process, rank 0.

    Args:
        output_dir: the folder of the run; made on the first save.
        total_limit: how many checkpoints stay; `None` keeps all.

    Raises:
        ValueError: `total_limit` is below two. With one, damage to the newest would lose the run.
    """

    def __init__(self, output_dir: str | os.PathLike[str], total_limit: int | None = 3):
        if total_limit is not None and total_limit < 2:
            raise ValueError(
                f"checkpoints_total_limit is {total_limit}, but at least 2 checkpoints are kept, so that one damaged "
                "file cannot lose the run: set it to 2 or more, or leave it empty to keep all"
            )
        self.output_dir = Path(output_dir)
        self.total_limit = total_limit

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Publish what `write(folder)` puts into an empty folder as `checkpoint-{step}`, then remove the oldest.

        A valid checkpoint of this step is left as it is and returned; a damaged one is replaced.

        Raises:
            CheckpointError: `write` or the disk failed. Nothing partial stays, the older checkpoints are untouched.
        """
        folder = self.output_dir / f"checkpoint-{step}"
        if folder.exists() and not verify(folder):
            return folder
        partial = self.output_dir / f".{folder.name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write(partial)
            seal(partial)
            if folder.exists():
                logger.warning("%s was damaged and is replaced", folder)
                _discard(folder)
            partial.rename(folder)
            _sync(self.output_dir)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"could not write {folder} ({error}). Older checkpoints are untouched: make room or mend the disk, "
                "then go on with --resume_from_checkpoint latest"
            ) from error
        self._rotate(folder)
        return folder

    def remove_partials(self) -> None:
        """Delete what killed runs left half-written or half-removed. Call it under the lock of the folder."""
        for pattern in (".checkpoint-*.partial", ".checkpoint-*.discarded"):
            for leftover in self.output_dir.glob(pattern):
                shutil.rmtree(leftover)

    def latest(self) -> Path | None:
        """The valid checkpoint with the highest step, or `None`. Each damaged one passed over is named in the log."""
        for folder in self._newest_first():
            problems = verify(folder)
            if not problems:
                return folder
            logger.warning("passing over the damaged checkpoint %s: %s", folder, "; ".join(problems))
        return None

    def resolve(self, value: str) -> Path:
        """The checkpoint that `--resume_from_checkpoint` means: "latest", or the path of one.

        Raises:
            CheckpointError: there is none, or the one named is damaged.
        """
        if value == "latest":
            folder = self.latest()
            if folder is None:
                raise CheckpointError(
                    f"no valid checkpoint in {self.output_dir}: name another folder's, or start anew without "
                    "--resume_from_checkpoint, with --overwrite_output_dir if a run is in the way"
                )
            return folder
        if problems := verify(value):
            raise CheckpointError(
                f"cannot resume from {value}: {'; '.join(problems)}. Name another checkpoint, or say 'latest' for the "
                "newest valid one of the output folder"
            )
        if Path(value).resolve().parent != self.output_dir.resolve() and self._newest_first():
            raise CheckpointError(
                f"{value} is another run's, and {self.output_dir} holds checkpoints of its own: they would be mixed. "
                "Choose another --output_dir"
            )
        return Path(value)

    def discard_after(self, step: int) -> None:
        """Delete checkpoints of later steps: a run that goes on from `step` will write its own."""
        for folder in self._newest_first():
            if int(folder.name.split("-")[1]) > step:
                logger.warning("going on from step %d: %s is of a later step and is removed", step, folder)
                _discard(folder)

    def _newest_first(self) -> list[Path]:
        named = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in self.output_dir.glob("checkpoint-*"))
        return [path for _, path in sorted(((int(name[1]), path) for name, path in named if name), reverse=True)]

    def _rotate(self, saved: Path) -> None:
        if self.total_limit is None:
            return
        others = [folder for folder in self._newest_first() if folder != saved]
        kept, surplus = others[: self.total_limit - 1], others[self.total_limit - 1 :]
        # `saved` is sound. If nothing else that stays is, the surplus may hold the only second copy of the run.
        if surplus and all(verify(folder) for folder in kept):
            logger.warning(
                "removing no old checkpoint: every other one that would stay in %s is damaged", self.output_dir
            )
            return
        for folder in surplus:
            _discard(folder)


def verify(folder: str | os.PathLike[str]) -> list[str]:
    """What is wrong with a checkpoint, in words; an empty list means that every byte is as it was written.

    Files that others have put there since, as file managers and network file systems do, are no matter: none is read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return ["there is no such folder"]
    if not (folder / MANIFEST_NAME).is_file():
        return [f"{MANIFEST_NAME} is missing, so this is no checkpoint or only a part of one"]
    try:
        recorded = dict(read_json(folder / MANIFEST_NAME)["files"])
        found = {name: folder / name for name in _file_names(folder)}
    except (CheckpointError, KeyError, TypeError, ValueError, OSError) as error:
        return [f"{MANIFEST_NAME} is unreadable ({error})"]
    problems = [f"{name} is missing" for name in sorted(recorded.keys() - found.keys())]
    for name in sorted(recorded.keys() & found.keys()):
        problems += _compare(name, found[name], recorded[name])
    return problems


def _compare(name: str, path: Path, recorded: dict[str, Any]) -> list[str]:
    try:
        size = path.stat().st_size
        if size != recorded["size"]:
            return [f"{name} has {size} bytes, not {recorded['size']}"]
        if _sha256(path) != recorded["sha256"]:
            return [f"{name} has the right size, but other bytes than were written"]
    except (KeyError, TypeError, OSError) as error:
        return [f"{name} cannot be checked ({error!r})"]
    return []


def _file_names(folder: Path) -> list[str]:
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name != MANIFEST_NAME)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Bring every file to the disk, then the manifest that `verify` reads, then the folders that name them."""
    files = {}
    for name in _file_names(folder):
        _sync(folder / name)
        files[name] = {"size": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
    write_json(folder / MANIFEST_NAME, {"files": files})
    _sync(folder / MANIFEST_NAME)
    for path in (*folder.rglob("*/"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(folder: Path) -> None:
    """Remove a checkpoint so that a kill in between leaves nothing with a checkpoint's name."""
    hidden = folder.with_name(f".{folder.name}.discarded")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    # No reason to end a run: what will not go now is hidden, and goes with `remove_partials`.
    shutil.rmtree(hidden, ignore_errors=True)
