"""The pre-training script, recorded: what each step saw and made of the weights, each save; with trouble on demand.

    python -m mimae.drills.apparatus.recording '{"folder": "records", "start": 0}' FLAGS…

A line of JSON is appended to `folder/<rank>.jsonl` for each forward pass and each update, and around each save. It is
written at once: what a kill leaves is what was done before it.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from safetensors.torch import save_file

from mimae.data.sources import remote
from mimae.run_mim_pretrain import main
from mimae.training.protocols import PretrainingModel, TrainingObserver

FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


class DeathInSave(NamedTuple):
    """When a run kills itself: in which save since it was started, and where in it.

    `fraction` is of the time that a save takes, or with `by_operation` of its file operations: before any of them, the
    rename and the rotation's removals included, it dies with the same chance.
    """

    save: int
    fraction: float
    by_operation: bool = False


class Scaling(NamedTuple):
    """Images that the model is given with other pixels: all of the global batch from `first_image` on, times `factor`.

    In these steps only, or in all. A factor that is no number makes pixels that are none.
    """

    factor: float
    first_image: int
    steps: tuple[int, ...] | None = None


class Impatience(NamedTuple):
    """Shorter waits of a reader for its server, in seconds, than a run in earnest has."""

    between_tries: float
    for_an_answer: float


class Recorder:
    """Appends to the record of one process.

    Args:
        folder: of the record; made if need be.
        start: how often the run was started before.
        rank: of the process.
    """

    def __init__(self, folder: Path, start: int, rank: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.start, self.rank = folder, start, rank
        self._descriptor = os.open(folder / f"{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, **line: Any) -> None:
        """One system call: a line is there whole, or not at all."""
        line |= {"start": self.start, "time": time.time()}
        os.write(self._descriptor, f"{json.dumps(line)}\n".encode())


def digest(tensor: torch.Tensor) -> str:
    """Twelve digits that tell it from others."""
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()[:12]


class SaveWatch:
    """Counts the file operations of the saves of this process, and kills it in one of them if asked."""

    def __init__(self, death: DeathInSave | None):
        self._death = death
        self._operations = 0
        self._most_operations = 0
        self._longest = 0.0
        self._saves = 0
        self._is_saving = self._is_deadly = False
        sys.addaudithook(self._count)

    def _count(self, event: str, _arguments: tuple[Any, ...]) -> None:
        if self._is_saving and event in FILE_OPERATIONS:
            self._operations += 1
            if self._death and self._is_deadly and self._operations > self._death.fraction * self._most_operations:
                os.kill(os.getpid(), signal.SIGKILL)

    def __enter__(self) -> "SaveWatch":
        self._saves, self._operations, self._began = self._saves + 1, 0, time.perf_counter()
        if self._death is not None and self._saves == self._death.save:
            self._is_deadly = self._death.by_operation
            if not self._is_deadly:
                die_after(self._death.fraction * self._longest)
        self._is_saving = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._death is not None and self._saves == self._death.save:  # it was a quick one
            os.kill(os.getpid(), signal.SIGKILL)
        self._is_saving = False
        self.seconds = time.perf_counter() - self._began
        self._longest = max(self._longest, self.seconds)
        self._most_operations = max(self._most_operations, self._operations)


class RecordingObserver(TrainingObserver):
    """Tells a recorder what each step saw, found and made of the weights, and each save; with trouble if asked.

    Args:
        gradients: whether to write the gradient of every step, as the optimiser gets it, to
            `gradient-<rank>-<step>.safetensors` beside the record.
        scaling: of the pixels that the model of this process is given.
        death: in a save.
    """

    def __init__(self, recorder: Recorder, gradients: bool, scaling: Scaling | None, death: DeathInSave | None):
        self._recorder, self._gradients, self._scaling = recorder, gradients, scaling
        self._watch = SaveWatch(death)

    def on_pixels(self, step: int, pixel_values: torch.Tensor) -> torch.Tensor:
        """Scales them."""
        scaling = self._scaling
        if scaling is not None and (scaling.steps is None or step in scaling.steps):
            first = max(0, scaling.first_image - self._recorder.rank * len(pixel_values))
            pixel_values[first:] *= scaling.factor
        return pixel_values

    def on_forward(self, step: int, batch: dict[str, Any], output: Any) -> None:
        """Records what was seen, and the loss."""
        self._recorder.write(
            step=step,
            epoch=int(batch["epoch"][0]),
            index=batch["index"].tolist(),
            noise=[digest(each) for each in batch["noise"]],
            pixels=[digest(each) for each in batch["pixel_values"]],
            reconstruction_loss=float(output.reconstruction_loss),
        )

    def on_gradients(self, step: int, model: PretrainingModel) -> None:
        """Keeps them, if asked."""
        if self._gradients:
            parameters = model.named_parameters()
            gradients = {name: p.grad.clone() for name, p in parameters if p.grad is not None}
            name = f"gradient-{self._recorder.rank}-{step}.safetensors"
            save_file(gradients, self._recorder.folder / name)

    def on_update(self, step: int, model: PretrainingModel) -> None:
        """Records the weights."""
        weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        self._recorder.write(updated=step, weights=digest(weights))

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Records when a save begins and ends."""
        self._recorder.write(saving=step)
        with self._watch:
            yield
        self._recorder.write(saved=step, seconds=self._watch.seconds)


def die_after(seconds: float) -> None:
    """`kill -9` of this process, from a thread beside whatever it does then."""

    def die() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=die, daemon=True).start()


def shorten_waits(impatience: Impatience) -> None:
    """Of reads over a network."""
    datasets.config.STREAMING_READ_RETRY_INTERVAL = impatience.between_tries
    remote.READ_TIMEOUT = impatience.for_an_answer


def run(options: dict[str, Any], argv: Sequence[str]) -> int:
    """Runs the script.

    Args:
        options: "folder" of the record and the number of the "start"; "death", "scaling" and "impatience", each the
            fields of its class; whether to keep "gradients".
        argv: the script's flags.
    """
    recorder = Recorder(Path(options["folder"]), options["start"], int(os.environ.get("RANK", "0")))
    recorder.write(pid=os.getpid())
    observer = RecordingObserver(
        recorder,
        gradients=options["gradients"],
        scaling=Scaling(**options["scaling"]) if options.get("scaling") else None,
        death=DeathInSave(**options["death"]) if options.get("death") else None,
    )
    if options.get("impatience"):
        shorten_waits(Impatience(**options["impatience"]))
    return main(argv, observer)


if __name__ == "__main__":
    sys.exit(run(json.loads(sys.argv[1]), sys.argv[2:]))
