"""Runs of the pre-training script in processes of their own."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from mimae.flags.recipes import as_argv
from mimae.training.checkpoints.store import verify

from .launching import Launch, Process, free_port, launched, rank_environment
from .recording import DeathInSave, Impatience, Scaling
from .records import Record

RECIPE = Path(__file__).with_name("tiny.yaml")
PATIENCE = 300.0  # seconds that any single wait may take before it counts as a hang
TIMINGS = {"seconds_per_step", "images_per_second", "views_per_second"}
GRACE = 10.0  # seconds in which workers notice that the process they work for is gone

_runs: set["Run"] = set()
_no_more = threading.Event()


class HangError(RuntimeError):
    """A run did not do in time what it was waited for."""


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
        self.output_dir, self.record = folder / "out", Record(folder / "records")
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

        Raises:
            RuntimeError: after `end_runs` of all.
        """
        if _no_more.is_set():
            raise RuntimeError("no run is started any more")
        options = {"folder": str(self.record.folder), "start": len(self.started), "gradients": gradients}
        options |= {"death": death and death._asdict(), "scaling": scaling and scaling._asdict()}
        options |= {"impatience": impatience and impatience._asdict()}
        argv = ["--config", str(self.recipe), "--output_dir", str(self.output_dir), *as_argv(self.flags | flags)]
        argv += ["--resume_from_checkpoint", "latest"] if self.checkpoints() else ["--overwrite_output_dir"]
        self.started.append(time.time())
        port = free_port()
        self.processes = [
            self.launch(options, argv, rank_environment(rank, self.num_processes, port), self.folder / "log.txt")
            for rank in range(self.num_processes)
        ]
        _runs.add(self)

    def send(self, signum: int) -> None:
        """Sends a signal to all processes, with their workers."""
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):  # it has just ended, or has no group of its own yet
                    os.killpg(process.pid, signum)

    def kill(self) -> list[int | None]:
        """`kill -9`, until they are gone; returns the exit codes."""
        deadline = time.monotonic() + PATIENCE
        while self.is_alive() and time.monotonic() < deadline:
            self.send(signal.SIGKILL)
            time.sleep(0.002)
        return [process.poll() for process in self.processes]

    def wait(self, seconds: float = PATIENCE) -> list[int | None]:
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
                self.kill()
                raise HangError(f"{self.folder} did not come on in {seconds:.0f} s:\n{self.log()[-4000:]}")
            time.sleep(0.002)

    def wait_for_passes(self, number: int) -> None:
        """Waits until the main process has done so many forward passes, over all starts, or the run has ended."""
        self.wait_for(lambda: self.record.num_passes() >= number or not self.is_alive())

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
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(process.pid) in sessions and process.info["status"] != psutil.STATUS_ZOMBIE:
                    alive.append(process.pid)
        return alive

    def is_alive(self) -> bool:
        """Whether any of its processes is."""
        return any(process.poll() is None for process in self.processes)

    def log(self) -> str:
        """What it has printed, over all starts."""
        path = self.folder / "log.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def checkpoints(self) -> list[Path]:
        """All that have a checkpoint's name."""
        return list(self.output_dir.glob("checkpoint-*"))

    def valid_checkpoints(self) -> list[Path]:
        """Those of which every byte is as it was written."""
        return [folder for folder in self.checkpoints() if not verify(folder)]

    def metrics(self) -> list[dict[str, Any]]:
        """All that it has logged, but how fast it was."""
        lines = map(json.loads, (self.output_dir / "metrics.jsonl").read_text().splitlines())
        return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]

    def series(self, name: str) -> dict[int, float]:
        """A metric by step."""
        return {line["step"]: line[name] for line in self.metrics() if name in line}

    def weights(self) -> dict[str, torch.Tensor]:
        """The final model's."""
        return load_file(self.output_dir / "model.safetensors")

    def gradient(self, step: int) -> dict[str, torch.Tensor]:
        """Of a step, on the last process; it must have been started with `gradients`."""
        return load_file(self.record.folder / f"gradient-{self.num_processes - 1}-{step}.safetensors")


def end_runs(folder: Path | None = None) -> None:
    """Kills what is alive of the runs under a folder; without one all, and none is started any more."""
    if folder is None:
        _no_more.set()
    for run in list(_runs):
        if folder is None or run.folder.is_relative_to(folder):
            run.kill()
            _runs.discard(run)
