"""Words between processes: what one computes for all, and that all end with the reason where one has failed."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object

Result = TypeVar("Result")
# longer than any process is kept by the many tries at an image (see `data.remote`)
LONGEST_WAIT = timedelta(hours=2)


class OtherProcessError(RuntimeError):
    """Another process has failed, and so this one ends; the message names the other's error."""


class Agreement:
    """Numbers that the processes compare on the host, beside the training's own group: nobody waits for the device."""

    def __init__(self) -> None:
        self.group: Any = dist.new_group(backend="gloo", timeout=LONGEST_WAIT) if _are_several() else None

    def largest(self, number: int) -> int:
        """The largest number that any process gives. Collective."""
        if self.group is None:
            return number
        shared = torch.tensor(number)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.group)
        return int(shared)

    def close(self) -> None:
        """Lets go of the group: one that outlives the processes' own may keep a process from ending (torch 2.11)."""
        self.group = None


def together(compute: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """What each process computes for itself, if all of them can: else the others would wait in vain. Collective.

    Args:
        group: in which the processes talk; None = the training's own.

    Raises:
        Exception: what this process's own computation raises.
        OtherProcessError: another's has raised.
    """
    result: Any = None
    failure: Exception | None = None
    try:
        result = compute()
    except Exception as error:  # whatever it is, the other processes must know
        failure = error
    failures = [None if failure is None else f"{type(failure).__name__}: {last_line(failure)}"]
    if _are_several():
        failures *= dist.get_world_size()
        dist.all_gather_object(failures, failures[0], group=group)
    if failure is not None:
        raise failure
    for rank, words in enumerate(failures):
        if words is not None:
            raise OtherProcessError(f"process {rank} has failed, see its own words: {words}")
    return result


def on_main_process(compute: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """What the main process computes, on all processes; raises what `together` does. Collective."""
    result: list[Any] = [together(lambda: compute() if PartialState().is_main_process else None, group)]
    if _are_several():
        dist.broadcast_object_list(result, src=0, group=group)
    return result[0]


def everywhere(items: list[Any]) -> list[Any]:
    """The items of all processes, in the order of their ranks. Collective."""
    return gather_object(items) if PartialState().num_processes > 1 else items


def main_process_first(compute: Callable[[], Result]) -> Result:
    """What each process computes for itself, the others from what the main one has left in a cache. Collective.

    Raises what `together` does.
    """
    is_main = PartialState().is_main_process
    first: Any = together(lambda: compute() if is_main else None)
    return together(lambda: first if is_main else compute())


def last_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or repr(error)).splitlines()[-1]


def _are_several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
