"""Runs of the pre-training script in processes of their own, and what their records say."""

import hashlib
import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from safetensors.torch import load_file

from .launching import Launch, Process, launched
from .recording import DeathInSave, Impatience, Scaling

RECIPE = Path(__file__).with_name("tiny.yaml")
MOST_PROCESSES = 4
PATIENCE = 300.0  # seconds that any single wait may take before it counts as a hang
GRACE = 10.0  # seconds in which workers notice that the process they work for is gone


class HangError(RuntimeError):
    """A run did not do in time what it was waited for."""


class Comparison(NamedTuple):
    """A run beside the one that nothing happened to.

    Args:
        lost, repeated: samples of an epoch that counted less often, or more often.
        same_order: whether every step saw the same samples, crops and noise.
        same_weights: whether the final weights are the same bits.
    """

    lost: int
    repeated: int
    same_order: bool
    same_weights: bool

    @property
    def equal(self) -> bool:
        """Whether nothing tells them apart."""
        return self.same_order and self.same_weights


class Run:
    """One run in one folder, however often it is started, killed and resumed.

    Args:
        folder: holds `out`, the run's output folder, `records` and `log.txt`.
        flags: of the script, on top of the recipe.
        num_processes: ranks, each a process.
        recipe: that the flags change.
    """

    launch: Launch = staticmethod(launched)

    def __init__(self, folder: Path, flags: dict[str, Any], num_processes: int = 1, recipe: Path = RECIPE):
        self.folder, self.flags, self.num_processes, self.recipe = folder, flags, num_processes, recipe
        self.output_dir, self.records = folder / "out", folder / "records"
        self.processes: list[Process] = []
        self.started: list[float] = []  # the time of each start
        folder.mkdir(parents=True, exist_ok=True)

    def start(
        self,
        *,
        death: DeathInSave | None = None,
        scaling: Scaling | None = None,
        impatience: Impatience | None = None,
        gradients: bool = False,
        **flags: Any,
    ) -> None:
        """Starts its processes: a resume where there is a checkpoint, else from the beginning.

        Args:
            death, scaling, impatience, gradients: see `recording`.
            flags: on top of the run's.
        """
        options = {"folder": str(self.records), "start": len(self.started), "gradients": gradients}
        options |= {"death": death and death._asdict(), "scaling": scaling and scaling._asdict()}
        options |= {"impatience": impatience and impatience._asdict()}
        argv = ["--config", str(self.recipe), "--output_dir", str(self.output_dir), *_as_argv(self.flags | flags)]
        if any(self.output_dir.glob("checkpoint-*")):
            argv += ["--resume_from_checkpoint", "latest"]
        else:
            argv += ["--overwrite_output_dir"]
        self.started.append(time.time())
        port = _free_port()
        self.processes = [
            self.launch(options, argv, self._environment(rank, port), self.folder / "log.txt")
            for rank in range(self.num_processes)
        ]

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        """What `accelerate launch` and `torchrun` tell each process."""
        common = {"OMP_NUM_THREADS": "1"}
        if self.num_processes == 1:
            return common
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        sizes = {"WORLD_SIZE": str(self.num_processes), "LOCAL_WORLD_SIZE": str(self.num_processes)}
        return {**common, **ranks, **sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def signal(self, signum: int) -> None:
        """Sends a signal to all processes, with their workers."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signum)

    def kill(self) -> list[int]:
        """`kill -9`; returns the exit codes."""
        self.signal(signal.SIGKILL)
        return self.wait()

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """The exit codes. Raises: HangError."""
        self.wait_for(lambda: not self.is_alive(), seconds)
        return [process.poll() for process in self.processes]

    def finish(self, **options: Any) -> "Run":
        """Starts it and waits for its end. Raises: RuntimeError if that is not a good one."""
        self.start(**options)
        if any(codes := self.wait()):
            raise RuntimeError(f"{self.folder} ended with {codes}:\n{self.log()[-4000:]}")
        return self

    def wait_for(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Raises: HangError, after killing what is left."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise HangError(f"{self.folder} did not come on in {seconds:.0f} s:\n{self.log()[-4000:]}")
            time.sleep(0.002)

    def wait_for_passes(self, number: int) -> None:
        """Waits until the main process has done so many forward passes, over all starts, or the run has ended."""
        self.wait_for(lambda: self.num_passes() >= number or not self.is_alive())

    def wait_a_while(self, seconds: float) -> None:
        """Lets it run on, for so long or to its end."""
        deadline = time.monotonic() + seconds
        while self.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)

    def orphans(self) -> list[int]:
        """What it has started, workers included, and what is still there some time after it should be over."""
        deadline = time.monotonic() + GRACE
        while (alive := self._alive_in_sessions()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return alive

    def _alive_in_sessions(self) -> list[int]:
        sessions, alive = {process.pid for process in self.processes}, []
        for process in psutil.process_iter(["status"]):
            try:
                if os.getsid(process.pid) in sessions and process.info["status"] != psutil.STATUS_ZOMBIE:
                    alive.append(process.pid)
            except ProcessLookupError:
                continue
        return alive

    def is_alive(self) -> bool:
        """Whether any of its processes is."""
        return any(process.poll() is None for process in self.processes)

    def log(self) -> str:
        """What it has printed, over all starts."""
        return (self.folder / "log.txt").read_text(errors="replace")

    def lines(self, rank: int = 0) -> list[dict[str, Any]]:
        """The record of one process, over all starts. A last line that is cut off is left out."""
        path = self.records / f"{rank}.jsonl"
        content = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith("\n")]

    def num_passes(self, rank: int = 0) -> int:
        """How many forward passes it has done."""
        path = self.records / f"{rank}.jsonl"
        return path.read_bytes().count(b'"step"') if path.exists() else 0

    def passes(self, rank: int = 0) -> list[dict[str, Any]]:
        """Its forward passes."""
        return [line for line in self.lines(rank) if "step" in line]

    def seen(self) -> dict[int, list[list[Any]]]:
        """What counts of each step: epoch, index, noise and crop of its images in global order, pass by pass.

        As they were seen the last time, and whatever the number of processes: images of a forward pass follow one
        another by rank.
        """
        newest: dict[int, int] = {}  # step -> the last start that did it
        lines = [(rank, line) for rank in range(MOST_PROCESSES) for line in self.passes(rank)]
        for _, line in lines:
            newest[line["step"]] = max(line["start"], newest.get(line["step"], 0))
        passes: dict[int, dict[int, list[Any]]] = {step: {} for step in sorted(newest)}
        for rank, line in lines:
            if line["start"] == newest[line["step"]]:
                passes[line["step"]].setdefault(rank, []).append(line)
        return {step: _in_global_order(list(of_step.values())) for step, of_step in passes.items()}

    def samples(self) -> list[tuple[int, int]]:
        """Epoch and index of all images, in the order in which they counted."""
        return [image[:2] for passes in self.seen().values() for images in passes for image in images]

    def order_hash(self) -> str:
        """Of that order."""
        return hashlib.sha256(json.dumps(self.samples()).encode()).hexdigest()[:12]

    def series(self, name: str) -> dict[int, float]:
        """A metric by step, as it stands in the run's folder."""
        lines = map(json.loads, (self.output_dir / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line[name] for line in lines if name in line}

    def weights(self) -> dict[str, torch.Tensor]:
        """The final model's."""
        return load_file(self.output_dir / "model.safetensors")

    @cached_property
    def result(self) -> tuple[Counter, dict[int, Any], dict[str, torch.Tensor]]:
        """Of a finished run: its samples, counted; what its steps saw; its weights."""
        return Counter(self.samples()), self.seen(), self.weights()

    def compared_with(self, whole: "Run") -> Comparison:
        """Both must be finished."""
        (mine, my_steps, my_weights), (theirs, their_steps, their_weights) = self.result, whole.result
        same_weights = my_weights.keys() == their_weights.keys() and all(
            torch.equal(my_weights[name], their_weights[name]) for name in my_weights
        )
        return Comparison((theirs - mine).total(), (mine - theirs).total(), my_steps == their_steps, same_weights)


def _in_global_order(lines_by_rank: list[list[dict[str, Any]]]) -> list[list[Any]]:
    """The images of each forward pass, those of the first rank first."""
    return [[image for line in lines for image in _images(line)] for lines in zip(*lines_by_rank, strict=True)]


def _images(line: dict[str, Any]) -> list[tuple[int, int, str, str]]:
    each = zip(line["index"], line["noise"], line["pixels"], strict=True)
    return [(line["epoch"], *image) for image in each]


def _as_argv(flags: dict[str, Any]) -> list[str]:
    argv = []
    for name, value in flags.items():
        argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return argv


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
