"""How a recorded run gets its processes: launched for real, or forked from a server that has imported everything."""

import atexit
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
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
        multiprocessing.get_context("forkserver").set_forkserver_preload(["mimae.drills.apparatus.recording"])
        self._process = fork(_record, options, argv, environment=environment, log=log)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, or None while it lives."""
        return self._process.exitcode


def fork(function: Callable[..., Any], *args: Any, environment: dict[str, str], log: Path) -> BaseProcess:
    """Starts a process, in a session of its own, forked from the server.

    Args:
        function: what it does with `args`; what it returns is the exit code, as `sys.exit` takes it.
        environment: on top of the server's.
        log: what it prints is appended to it.
    """
    process = multiprocessing.get_context("forkserver").Process(
        target=_forked, args=(function, args, environment, log)
    )
    process.start()
    return process


def rank_environment(rank: int, num_processes: int, port: int) -> dict[str, str]:
    """What `accelerate launch` and `torchrun` tell each process.

    Args:
        port: of this machine, where the first of several awaits the others.
    """
    common = {"OMP_NUM_THREADS": "1"}
    if num_processes == 1:
        return common
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sizes = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    return {**common, **ranks, **sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _record(options: dict[str, Any], argv: list[str]) -> int:
    from .recording import run

    return run(options, argv)


def _forked(function: Callable[..., Any], args: tuple[Any, ...], environment: dict[str, str], log: Path) -> None:
    os.setsid()
    default = multiprocessing.get_all_start_methods()[0]
    multiprocessing.set_start_method(default, force=True)  # of workers; it was this process's own
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        sys.exit(function(*args))
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its processes without
