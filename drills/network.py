"""Streaming from a server that fails: now and then, and for good."""

import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

from .apparatus import sets
from .apparatus.comparing import GLOBAL_BATCH_SIZE, compare, figures_of, reference
from .apparatus.recording import Impatience
from .apparatus.runs import Run
from .apparatus.serving import FailingHandler, serve_folder
from .outcome import Outcome

SIZES = (59,) * 23 + (80,)  # more files than are kept open, so that they are fetched again and again
FAULTS_BEFORE_THE_BODY = ("reset", "silence", "429", "500", "503")
FAULTS = ("cut", "reset_in_the_body", "stall_in_the_body", *FAULTS_BEFORE_THE_BODY)
IMPATIENCE = Impatience(between_tries=0.1, for_an_answer=1.0)
BOUND = 120.0  # seconds in which a run must end that cannot read on
STEPS = 44


class Weather:
    """How a server is.

    Attributes:
        fault_rate: which part of the requests fails.
        is_out: whether all do.
        faults: how many did, by kind.
    """

    def __init__(self, seed: int = 0):
        self.fault_rate, self.is_out = 0.0, False
        self.faults: Counter[str] = Counter()
        self._chance = random.Random(seed)
        kinds: tuple[tuple[str, ...], ...] = (FAULTS, FAULTS_BEFORE_THE_BODY)
        self._turns = {each: cycle(each) for each in kinds}

    def next_fault(self, possible: tuple[str, ...]) -> str:
        """What happens to a request: one of these, by turns."""
        if self.is_out:
            return "reset"
        if self._chance.random() >= self.fault_rate:
            return "none"
        fault = next(self._turns[possible])
        self.faults[fault] += 1
        return fault


@contextmanager
def serving(folder: Path) -> Iterator[tuple[Weather, str]]:
    """A server of a folder: how it is, and its URL."""
    weather = Weather()

    class Handler(FailingHandler):
        def next_fault(self) -> str:
            return weather.next_fault(FAULTS if self.command == "GET" else FAULTS_BEFORE_THE_BODY)

    with serve_folder(folder, Handler) as url:
        yield weather, url


def shard_flags(folder: Path, url: str) -> dict[str, Any]:
    """Flags that read the folder's shards from the server."""
    urls = [f"{url}/{path.name}" for path in sorted(folder.glob("*.parquet"))]
    return {"data_files": urls, "streaming": True, "shuffle_window": sets.WINDOW}


def faults(folder: Path, steps: int = STEPS, fault_rate: float = 0.25) -> Outcome:
    """A run over a server that fails one request in four."""
    whole, shards = local_run(folder, steps=steps)
    with serving(shards) as (weather, url):
        flags = {**whole.flags, **shard_flags(shards, url), "cache_dir": folder / "other-cache"}
        run = Run(folder / "over-http", flags)
        run.start(impatience=IMPATIENCE)
        run.wait_for_passes(1)
        weather.fault_rate = fault_rate  # 🤗 Datasets, which looks the files up at the start, gives up at once
        codes = run.wait()
    comparison = compare(run, whole)
    return Outcome(
        drill="streaming over HTTP from a server that resets, cuts, stalls, is silent, says 429, 500 and 503",
        passed=codes == [0] and comparison.equal and set(weather.faults) == set(FAULTS),
        figures={"faults": weather.faults.total(), "kinds": len(weather.faults), **figures_of([comparison])},
    )


def outage(folder: Path, num_processes: int, steps: int = STEPS) -> Outcome:
    """A server that is gone for good in the middle of a run, and back when it is resumed."""
    whole, shards = local_run(folder, num_processes, steps)
    with serving(shards) as (weather, url):
        flags = {**whole.flags, **shard_flags(shards, url), "cache_dir": folder / "other-cache"}
        run = Run(folder / "over-http", flags, num_processes)
        run.start(impatience=IMPATIENCE)
        run.wait_for_passes(steps // 3)
        weather.is_out, began = True, time.monotonic()
        codes = run.wait(BOUND)
        seconds = time.monotonic() - began
        weather.is_out = False
        run.finish(impatience=IMPATIENCE)
    comparison, redone = compare(run, whole), run.record.most_redone()
    return Outcome(
        drill=f"the HTTP server gone for good, processes: {num_processes}",
        passed=codes == [1] * num_processes and redone == 0 and comparison.equal,
        figures={
            "exit codes": codes,
            "seconds to the end": round(seconds, 1),
            "bound in seconds": BOUND,
            "steps lost": redone,
            **figures_of([comparison]),
        },
    )


def stop_in_an_outage(folder: Path, steps: int = STEPS) -> Outcome:
    """SIGTERM while a server that is gone is asked again and again, with the waits of a run in earnest."""
    whole, shards = local_run(folder, steps=steps)
    with serving(shards) as (weather, url):
        flags = {**whole.flags, **shard_flags(shards, url), "cache_dir": folder / "other-cache"}
        run = Run(folder / "over-http", flags)
        run.start()
        run.wait_for_passes(steps // 3)
        weather.is_out = True
        run.wait_for(lambda: "could not be read, try 1" in run.log() or not run.is_alive())
        run.send(signal.SIGTERM)
        asked = time.monotonic()
        codes = run.wait()
        seconds = time.monotonic() - asked
        weather.is_out = False
        run.finish()
    comparison, redone = compare(run, whole), run.record.most_redone()
    return Outcome(
        drill="SIGTERM while the HTTP server is gone",
        passed=codes == [128 + signal.SIGTERM] and redone == 0 and comparison.equal,
        figures={
            "exit code": codes[0],
            "seconds to the end": round(seconds, 1),
            "steps lost": redone,
            **figures_of([comparison]),
        },
    )


def local_run(folder: Path, num_processes: int = 1, steps: int = STEPS) -> tuple[Run, Path]:
    """The run that reads the same shards from the disk, and where they lie."""
    pattern = sets.write_parquet(folder / "shards", sets.encoded_digits(), SIZES)
    flags = {"data_files": pattern, "streaming": True, "shuffle_window": sets.WINDOW, "cache_dir": folder / "cache"}
    flags |= {"per_device_train_batch_size": GLOBAL_BATCH_SIZE // num_processes, "dataloader_num_workers": 1}
    return reference(folder / "whole", steps, num_processes, **flags), folder / "shards"
