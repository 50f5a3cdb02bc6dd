"""Processes that are forked, not launched: seconds of imports sooner, for tests of what a script does once it runs."""

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from mimae.drills.apparatus.launching import fork, free_port, rank_environment

PATIENCE = 300.0  # seconds


class Finished(NamedTuple):
    """What came of it: the exit code, the first that is not 0 of several, and all that was printed."""

    returncode: int
    output: str


def start_server() -> None:
    """One for all tests of this process; who comes later with other wishes gets it as it is."""
    multiprocessing.set_forkserver_preload(["mimae.tests.preloaded"])
    forkserver.ensure_running()


def run_forked(
    program: str | Path,
    argv: Sequence[str],
    *,
    num_processes: int = 1,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
) -> Finished:
    """Runs a program as `python program argv` would, or several as `torchrun` would, and waits for its end.

    What Python reads when it starts, and libraries when they are imported, is the server's: `environment` cannot
    change where the Hub is.

    Args:
        program: a script, or the name of a module.

    Raises:
        TimeoutError: with what was printed; all its processes are ended.
    """
    port, deadline = free_port(), time.monotonic() + PATIENCE
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{rank}.txt" for rank in range(num_processes)]
        processes = []
        for rank, log in enumerate(logs):
            ranked = {**(environment or {}), **rank_environment(rank, num_processes, port)}
            processes.append(start_forked(program, argv, log, cwd, ranked))
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        is_late = any(process.is_alive() for process in processes)
        for process in processes:
            process.kill()
            process.join()
        output = "".join(log.read_text(errors="replace") for log in logs if log.exists())
    if is_late:
        raise TimeoutError(f"{program} did not end in {PATIENCE:.0f} s:\n{output[-4000:]}")
    return Finished(next((process.exitcode for process in processes if process.exitcode), 0), output)


def start_forked(
    program: str | Path,
    argv: Sequence[str],
    log: Path,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
) -> BaseProcess:
    """The same without waiting, in a session of its own; what it prints goes to `log`."""
    start_server()
    return fork(_run, program, list(argv), cwd or Path.cwd(), environment=environment or {}, log=log)


def _run(program: str | Path, argv: list[str], cwd: Path) -> None:
    os.chdir(cwd)
    sys.argv = [str(program), *argv]
    if isinstance(program, Path):
        runpy.run_path(str(program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
