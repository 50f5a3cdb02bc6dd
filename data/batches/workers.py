"""A DataLoader that is a guest in the program which uses it: its workers are its own affair, and nothing else is."""

import atexit
import contextlib
import copy
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset


class GuestLoader(DataLoader[Any]):
    """Leaves the caller's random numbers and signal handlers alone, and takes its workers with it at the end.

    A worker that is killed, for memory say, is an error of the batch that is waited for. torch's handler of SIGCHLD
    would raise it wherever the main process is, in the middle of an optimiser's step too; where the program has that
    handler already, by loaders of its own, it stays.

    Args:
        options: of `DataLoader`, but for `generator`, `worker_init_fn` and `multiprocessing_context`.
    """

    def __init__(self, dataset: Dataset[Any], *, num_workers: int = 0, **options: Any):
        super().__init__(
            dataset,
            num_workers=num_workers,
            generator=torch.Generator(),  # without one of its own a DataLoader draws from the caller's
            worker_init_fn=leave_stop_signals_to_the_caller,
            multiprocessing_context=remembering_context() if num_workers else None,
            **options,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names the class of its iterator
        with child_handler_kept() if self.num_workers else contextlib.nullcontext():
            return super().__iter__()


def leave_stop_signals_to_the_caller(worker: int) -> None:
    """A signal to the process group must not take the workers from a run that wants to save and end in good order."""
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)


@contextlib.contextmanager
def child_handler_kept() -> Iterator[None]:
    """After it, the program's handler of SIGCHLD is the one it had."""
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    # only the main thread can have lost it; None is one that Python does not know
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGCHLD, handler)


def remembering_context() -> BaseContext:
    """multiprocessing's own, but that it remembers the processes that it makes, to end them with this one.

    It stays with the loader where accelerate makes another of it, to skip the first batches of a resumed epoch.
    """
    context: Any = copy.copy(multiprocessing.get_context())
    make = context.Process

    def remembered(*args: Any, **options: Any) -> BaseProcess:
        process = make(*args, **options)
        _workers_of(os.getpid()).add(process)
        return process

    context.Process = remembered
    return context


@functools.cache
def _workers_of(pid: int) -> WeakSet[BaseProcess]:
    """The workers that a process has made, which end with it. A fork of it has others."""
    workers: WeakSet[BaseProcess] = WeakSet()
    atexit.register(_end, pid, workers)
    return workers


def _end(pid: int, workers: WeakSet[BaseProcess]) -> None:
    """Where a program ends with a loader still open, multiprocessing sends SIGTERM and would wait for ever."""
    if pid != os.getpid():
        return  # a fork, which has inherited the hook
    with child_handler_kept():
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise, and nobody waits any more
        for worker in [worker for worker in workers if worker.is_alive()]:
            worker.kill()
            worker.join()
