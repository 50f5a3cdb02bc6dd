"""Fixtures shared by all tests. Small models; one CPU thread, because sums in another order are other numbers."""

import sys
from pathlib import Path

import pytest
import torch

import mimae
from mimae.drills.apparatus.launching import Forked
from mimae.drills.apparatus.runs import Run, end_runs

sys.path.append(str(Path(__file__).parent))  # for `import references`, under --import-mode=importlib
import drawing
import forking

torch.set_num_threads(1)
drawing.leave_blank()


def pytest_sessionstart():
    """An editable install of another checkout would be tested instead of this one, and nobody would notice."""
    tested, checkout = Path(mimae.__file__).resolve().parent, Path(__file__).resolve().parents[1]
    if tested != checkout:
        pytest.exit(f"`import mimae` finds {tested}, not this checkout, {checkout}; see `make install`", returncode=4)


def pytest_collection_modifyitems(items):
    """The longest test begins first: one of two processes would be left alone with it at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/test_walkthrough.py"))


@pytest.fixture
def forked_runs(monkeypatch, tmp_path):
    """Runs of drills get their processes from a server that has imported everything: seconds sooner, the same else."""
    forking.start_server()
    monkeypatch.setattr(Run, "launch", staticmethod(Forked))
    yield
    end_runs(tmp_path)


@pytest.fixture
def drawn():
    """Pictures are drawn, not left blank."""
    with drawing.drawn():
        yield


@pytest.fixture(autouse=True)
def fixed_seed():
    """What a test draws does not depend on what ran before it."""
    torch.manual_seed(0)
