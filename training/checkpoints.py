"""Checkpoints that survive a kill, a full disk and a flipped bit, and one run per output folder.

A checkpoint is a folder `checkpoint-{step}` of safetensors and JSON files, with a `manifest.json` that holds the size
and the SHA-256 of every other file in it. It is written under a hidden name, brought to the disk, and gets its own
name in one rename: whatever has that name was once complete. The manifest shows whether it still is.
"""

import fcntl
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..data.words import some

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
OPTIMIZER_TENSORS_NAME = "optimizer.safetensors"
OPTIMIZER_GROUPS_NAME = "optimizer.json"
LOCK_NAME = ".lock"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, is damaged, or belongs to another model."""


class OutputDirInUseError(RuntimeError):
    """Another live process trains into the same folder."""


class CheckpointStore:
    """The checkpoints of one run: `output_dir/checkpoint-{step}`, written by one process, rank 0.

    Args:
        output_dir: the folder of the run; made on the first save.
        total_limit: how many checkpoints stay; `None` keeps all.

    Raises:
        ValueError: `total_limit` is below two. With one, damage to the newest would lose the run.
    """

    def __init__(self, output_dir: str | os.PathLike, total_limit: int | None = 3):
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
        """Delete what killed runs left half-written or half-removed. Call it under the `OutputDirLock`."""
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


def verify(folder: str | os.PathLike) -> list[str]:
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


class OutputDirLock:
    """One run per output folder.

    A POSIX record lock: the kernel drops it with the process that holds it, however that ends, and worker processes
    do not inherit it. Its price: it is the process that holds it, so it does not part two runs in one process, and
    closing any other handle on `.lock` in that process drops it.
    """

    def __init__(self, output_dir: str | os.PathLike):
        self.path = Path(output_dir) / LOCK_NAME
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the folder, making it if need be.

        Raises:
            OutputDirInUseError: a live process has it; the message names its pid and host.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A bare descriptor: a file object would drop the lock when this object is garbage.
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.read(descriptor, 1000).decode() or "a process that has not yet written its pid"
            os.close(descriptor)
            raise OutputDirInUseError(
                f"{self.path.parent} is in use by {holder}: wait for it to end, end it, or choose another --output_dir"
            ) from error
        os.truncate(descriptor, 0)
        os.write(descriptor, f"pid {os.getpid()} on host {socket.gethostname()}".encode())
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the folder back. The empty file stays: removing it could take it from under the next holder."""
        if self._descriptor is not None:
            os.truncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "OutputDirLock":
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def save_optimizer(folder: str | os.PathLike, optimizer: torch.optim.Optimizer, parameter_names: list[str]) -> None:
    """Write an optimiser's state as `optimizer.safetensors` and its groups' hyper-parameters as `optimizer.json`.

    Args:
        folder: where the two files go.
        optimizer: one whose state is tensors and whose hyper-parameters are plain numbers, as AdamW's are.
        parameter_names: a name for each parameter, in the order of the optimiser's groups.
    """
    state_dict = optimizer.state_dict()
    tensors = {
        f"{parameter_names[index]}.{key}": value.detach().cpu().contiguous()
        for index, state in state_dict["state"].items()
        for key, value in state.items()
    }
    groups = [
        {**group, "params": [parameter_names[index] for index in group["params"]]}
        for group in state_dict["param_groups"]
    ]
    save_file(tensors, Path(folder) / OPTIMIZER_TENSORS_NAME)
    write_json(Path(folder) / OPTIMIZER_GROUPS_NAME, {"param_groups": groups})


def load_optimizer(folder: str | os.PathLike, optimizer: torch.optim.Optimizer, parameter_names: list[str]) -> None:
    """Restore, bit for bit, what `save_optimizer` wrote, onto the devices of the optimiser's parameters.

    Raises:
        CheckpointError: a file is unreadable, or the parameters differ from the saved ones in name, group or shape.
    """
    tensors = load_tensors(Path(folder) / OPTIMIZER_TENSORS_NAME)
    groups = read_json(Path(folder) / OPTIMIZER_GROUPS_NAME)["param_groups"]
    _check_same_parameters(folder, groups, tensors, optimizer, parameter_names)

    index_of = {name: index for index, name in enumerate(parameter_names)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition(".")
        state.setdefault(index_of[parameter_name], {})[key] = tensor
    for group in groups:
        # JSON has no tuples; `betas` was one.
        group.update({key: tuple(value) for key, value in group.items() if isinstance(value, list)})
        group["params"] = [index_of[name] for name in group["params"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_same_parameters(
    folder: str | os.PathLike,
    groups: list[dict[str, Any]],
    tensors: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    parameter_names: list[str],
) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shapes = {name: parameter.shape for name, parameter in zip(parameter_names, parameters, strict=True)}
    remaining = iter(parameter_names)
    live_groups = [[next(remaining) for _ in group["params"]] for group in optimizer.param_groups]
    saved_groups = [group["params"] for group in groups]
    saved_names = {name for group in saved_groups for name in group} | {key.rpartition(".")[0] for key in tensors}

    differences = [f"{name} is only in the checkpoint" for name in sorted(saved_names - shapes.keys())]
    differences += [f"{name} is only in the model" for name in sorted(shapes.keys() - saved_names)]
    for key, tensor in tensors.items():
        shape = shapes.get(key.rpartition(".")[0])
        # The step count is a scalar beside parameters of any shape.
        if shape is not None and tensor.ndim > 0 and tensor.shape != shape:
            differences.append(f"{key} is {tuple(tensor.shape)}, its parameter {tuple(shape)}")
    if not differences and saved_groups != live_groups:
        differences = ["the parameter groups are cut differently"]
    if differences:
        shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
        raise CheckpointError(
            f"{folder} is a checkpoint of another model: {shown}. Resume with the config that the checkpoint holds"
        )


# settings that older checkpoints do not name, as all runs had them then
ONCE_FIXED = {
    "model_type": "mimae",
    "crop_interpolation": "bicubic",
    "schedule.start": 0.0,
    "drop_path_rate": 0.0,
    "classifier_pooling": "mean",
}


def refuse_other_settings(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """A resumed run must have the settings that its result follows from.

    Raises:
        ValueError: names each key that differs, with both values.
    """
    saved, current = {**ONCE_FIXED, **saved}, {**ONCE_FIXED, **current}
    if saved["model_type"] != current["model_type"]:
        raise ValueError(
            f"the checkpoint's run trains a {saved['model_type']!r}, these flags a {current['model_type']!r}: give "
            "the run's own recipe with --config"
        )
    missing = object()
    keys = [k for k in {**saved, **current} if saved.get(k, missing) != current.get(k, missing)]
    if keys:
        differences = some([f"{k}: {saved.get(k, 'unset')} then, {current.get(k, 'unset')} now" for k in keys])
        raise ValueError(
            f"the checkpoint's run had other settings ({differences}). Resume with the same, or start a run of its "
            "own from these weights with --model_name_or_path"
        )


def random_state() -> dict[str, torch.Tensor]:
    """The state of torch's generators in this process, as uint8 vectors: `cpu`, and `cuda` where there is a GPU."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Continue the generators where `random_state` saw them; a GPU's state is passed over where there is no GPU."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save_process_states(folder: Path, states: list[dict[str, torch.Tensor]]) -> None:
    """Write what each process has of its own, in the order of ranks."""
    for rank, state in enumerate(states):
        save_file(state, folder / f"process_{rank}.safetensors")


def load_process_states(folder: Path) -> list[dict[str, torch.Tensor]]:
    """The inverse of `save_process_states`. Raises: CheckpointError."""
    num_processes = len(list(folder.glob("process_*.safetensors")))
    return [load_tensors(folder / f"process_{rank}.safetensors") for rank in range(num_processes)]


def load_tensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, in memory of their own.

    Raises:
        CheckpointError: the file is missing or is no safetensors file. Nothing in it is ever executed.
    """
    try:
        # safetensors maps the file; without the copy, live state would lean on a file that rotation removes.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file ({error})") from error


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file.

    Raises:
        CheckpointError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable JSON file ({error})") from error


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON that ends with its last bracket, so that losing a single byte shows."""
    Path(path).write_text(json.dumps(value, indent=2), encoding="utf-8")
