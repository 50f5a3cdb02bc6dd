"""Fixtures shared by all tests. Small models; one CPU thread, because sums in another order are other numbers."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # for `import references`, under --import-mode=importlib

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    """What a test draws does not depend on what ran before it."""
    torch.manual_seed(0)
