"""Runs of the pre-training script in processes of their own, and what their records say."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .recording import DeathInSave, NotANumber

RECIPE = Path(__file__).with_name("tiny.yaml")
MOST_PROCESSES = 4
MARK = "MIMAE_DRILL"  # a variable in the environment of all that a run starts
PATIENCE = 300.0  # seconds that any single wait may take before it counts as a hang


class HangError(RuntimeError):
    """A run did not do in time what it was waited for."""


class Run:
    """One run in one folder, however often it is started, killed and resumed.

    Args:
        folder: holds `out`, the run's output folder, `records` and `log.txt`.
        flags: of the script, on top of `tiny.yaml`.
        num_processes: ranks, each a process.
    """

    def __init__(self, folder: Path, flags: dict[str, Any], num_processes: int = 1):
        self.folder, self.flags, self.num_processes = folder, flags, num_processes
        self.output_dir, self.records = folder / "out", folder / "records"
        self.processes: list[subprocess.Popen] = []
        self.starts = 0
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *, death: DeathInSave | None = None, trouble: NotANumber | None = None, **flags: Any) -> None:
        """Starts its processes: a resume where there is a checkpoint, else from the beginning."""
        options = {"folder": str(self.records), "start": self.starts}
        options |= {"death": death and death._asdict(), "trouble": trouble and trouble._asdict()}
        self.starts += 1
        argv = ["--config", str(RECIPE), "--output_dir", str(self.output_dir), *_as_argv(self.flags | flags)]
        if any(self.output_dir.glob("checkpoint-*")):
            argv += ["--resume_from_checkpoint", "latest"]
        else:
            argv += ["--overwrite_output_dir"]
        port = _free_port()
        with (self.folder / "log.txt").open("ab") as log:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, "-m", "mimae.drills.recording", json.dumps(options), *argv],
                    env={
                        **os.environ,
                        "OMP_NUM_THREADS": "1",
                        MARK: str(self.folder),
                        **self._environment(rank, port),
                    },
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for rank in range(self.num_processes)
            ]

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        common = {"OMP_NUM_THREADS": "1", MARK: str(self.folder)}
        if self.num_processes == 1:
            return common
        return {
            **common,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.num_processes),
            "LOCAL_WORLD_SIZE": str(self.num_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Sends a signal to all processes, with their workers."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signum)

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """The exit codes. Raises: HangError."""
        self.wait_for(lambda: not self.is_alive(), seconds)
        return [process.returncode for process in self.processes]

    def finish(self) -> "Run":
        """Starts it and waits for its end. Raises: RuntimeError if that is not a good one."""
        self.start()
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
        self.wait_for(lambda: self.num_passes() >= number or not self.is_alive())

    def wait_a_while(self, seconds: float) -> None:
        """Lets it run on, for so long or to its end."""
        deadline = time.monotonic() + seconds
        while self.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)

    def survivors(self) -> list[int]:
        """Processes that it has started, workers included, and that are still there when it should be over."""
        mark = f"{MARK}={self.folder}".encode()
        alive = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in environment.read_bytes().split(b"\0"):
                    alive.append(int(environment.parent.name))
            except OSError:  # it is another user's, or has ended
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
        """What counts of each step: its samples, crops and noise in global order, as they were seen the last time.

        Whatever the number of processes: images of a forward pass follow one another by rank.
        """
        newest: dict[int, int] = {}  # step -> the last start that did it
        lines = [(rank, line) for rank in range(MOST_PROCESSES) for line in self.passes(rank)]
        for _, line in lines:
            newest[line["step"]] = max(line["start"], newest.get(line["step"], 0))
        passes: dict[int, dict[int, list[Any]]] = {step: {} for step in sorted(newest)}
        for rank, line in lines:
            if line["start"] == newest[line["step"]]:
                passes[line["step"]].setdefault(rank, []).append(line)
        return {
            step: [
                [image for line in micro for image in zip(line["index"], line["noise"], line["pixels"], strict=True)]
                for micro in zip(*of_step.values(), strict=True)
            ]
            for step, of_step in passes.items()
        }

    def order_hash(self) -> str:
        """Of the indices of all images, in the order in which they counted."""
        indices = [image[0] for passes in self.seen().values() for images in passes for image in images]
        return hashlib.sha256(json.dumps(indices).encode()).hexdigest()[:12]

    def series(self, name: str) -> dict[int, float]:
        """A metric by step, as it stands in the run's folder."""
        lines = map(json.loads, (self.output_dir / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line[name] for line in lines if name in line}

    def weights(self) -> dict[str, torch.Tensor]:
        """The final model's."""
        return load_file(self.output_dir / "model.safetensors")

    def equals(self, other: "Run") -> bool:
        """Whether both saw the same samples, crops and noise in the same order, and ended with the same bits."""
        mine, theirs = self.weights(), other.weights()
        same_weights = mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
        return same_weights and self.seen() == other.seen()


def _as_argv(flags: dict[str, Any]) -> list[str]:
    argv = []
    for name, value in flags.items():
        argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return argv


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
