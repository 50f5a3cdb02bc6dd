"""What every script does first: threads, logging, and words between processes."""

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.utils import logging as transformers_logging

from ..version import __version__

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


def limit_cpu_threads(cpu_threads: int | None) -> None:
    """On a CPU, gives each process of this machine its part of so many threads; None = as they are."""
    if PartialState().device.type == "cpu" and cpu_threads is not None:
        torch.set_num_threads(max(1, cpu_threads // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def start_logging(mixed_precision: str, recipe: Path) -> None:
    """Logs from the main process, errors from all; the first line says how many processes there are."""
    state = PartialState()
    logging.basicConfig(
        level=logging.INFO if state.is_main_process else logging.ERROR,
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    transformers_logging.disable_progress_bar()  # of every load and save
    logger.info(
        "world size %d on %s, precision %s, mimae %s", state.num_processes, state.device, mixed_precision, __version__
    )
    logger.info("recipe %s", recipe)
