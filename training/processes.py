"""What every script does first: threads, logging, and words between processes."""

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

logger = logging.getLogger("mimae")

Result = TypeVar("Result")
# longer than any process is kept by the many tries at an image (see `data.remote`)
LONGEST_WAIT = timedelta(hours=2)


class Agreement:
    """Numbers that the processes compare on the host, beside the training's own group: nobody waits for the device."""

    def __init__(self):
        alone = not (dist.is_initialized() and dist.get_world_size() > 1)
        self._group = None if alone else dist.new_group(backend="gloo", timeout=LONGEST_WAIT)

    def largest(self, number: int) -> int:
        """The largest number that any process gives. Collective."""
        if self._group is None:
            return number
        shared = torch.tensor(number)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self._group)
        return int(shared)

    def close(self) -> None:
        """Lets go of the group: one that outlives the processes' own may keep a process from ending (torch 2.11)."""
        self._group = None


def on_main_process(compute: Callable[[], Result]) -> Result:
    """What the main process computes, on all processes."""
    result = [compute() if PartialState().is_main_process else None]
    return broadcast_object_list(result)[0]
