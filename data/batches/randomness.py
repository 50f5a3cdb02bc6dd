"""The default generators of torch, Python and numpy, which libraries' augmentations draw from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_state_kept() -> Iterator[None]:
    """A context in which seeding and drawing leave the caller's random state (on the CPU) unchanged."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def seed_torch(seed: int) -> None:
    """Seeds torch's generator alone; the other two would take ten times as long."""
    # Not torch.manual_seed, which would also reseed the GPUs of a caller that loads in its own process.
    torch.default_generator.manual_seed(seed)


def seed_random_state(seed: int) -> None:
    """Seeds the three generators; `seed` has at most 63 bits."""
    seed_torch(seed)
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
