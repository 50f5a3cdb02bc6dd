"""How a recorded run gets its processes: launched for real, or forked from a server that has imported everything."""

import atexit
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Process(Protocol):
    """What is asked of a process, however it was started."""

    pid: int

    def poll(self) -> int | None:
        """The exit code, negative after a signal that killed it, or None while it lives."""


Launch = Callable[[dict[str, Any], list[str], dict[str, str], Path], Process]


def launched(options: dict[str, Any], argv: list[str], environment: dict[str, str], log: Path) -> Process:
    """A Python of its own, as a user starts it, in a session of its own.

    Args:
        options, argv: of `recording.run`.
        environment: on top of this process's.
        log: what it prints is appended to it.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "mimae.drills.apparatus.recording", json.dumps(options), *argv],
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


class Forked:
    """A process forked from a server that has imported all it needs: seconds sooner at its first step."""

    def __init__(self, options: dict[str, Any], argv: list[str], environment: dict[str, str], log: Path):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mimae.drills.apparatus.recording"])
        self._process = context.Process(target=_run_forked, args=(options, argv, environment, log))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, or None while it lives."""
        return self._process.exitcode


def _run_forked(options: dict[str, Any], argv: list[str], environment: dict[str, str], log: Path) -> None:
    from .recording import run

    os.setsid()
    default = multiprocessing.get_all_start_methods()[0]
    multiprocessing.set_start_method(default, force=True)  # of workers; it was this process's own
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        sys.exit(run(options, argv))
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its processes without
