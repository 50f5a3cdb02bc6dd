"""How everything here is timed: contestants take turns, and what counts are medians and ratios of one run."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch

MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Calls every contestant once a round, forwards and backwards in turn: what else the machine does meets all alike.

    Args:
        contestants: by name, what is timed.
        rounds, warm_up: calls that are timed, and calls before them.
        device: what is waited for before and after each call.
        clock: seconds; `time.process_time` for what one core does, so that its other work does not count.

    Returns:
        Seconds of each call, by contestant.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warm_up, rounds):
        for name in names if turn % 2 else reversed(names):
            gc.collect()
            elapsed = timed(contestants[name], device, clock)
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


def timed(call: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of one call, the device's work included."""
    settle(device)
    start = clock()
    call()
    settle(device)
    return clock() - start


def settle(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(seconds: Mapping[str, list[float]], slower: str, faster: str) -> float:
    """How many times as long one contestant takes as another: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(seconds[slower], seconds[faster], strict=True))


def matmul_rate(dtype: torch.dtype, device: torch.device, repeats: int = 20) -> float:
    """Floating-point operations per second of a large square matrix product: what the machine can do, measured."""
    side = MATRIX_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = take_turns({"product": lambda: left @ right}, rounds=repeats, warm_up=3, device=device)["product"]
    return 2 * side**3 / statistics.median(seconds)
