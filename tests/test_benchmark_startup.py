"""The benchmark of starting: what it says of a run is what the run did."""

import os
import re
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from runs import SCRIPT, SHORT_RUN, TINY_MODEL

from mimae.benchmarks.startup import (
    END_OF_IMPORTS,
    PROFILED_DEMO,
    Start,
    imports_table,
    measure,
    start_of,
    starts_table,
)

TINY = tuple(
    f"--{name}={value}"
    for name, value in {**TINY_MODEL, **SHORT_RUN, "probe_samples": 64, "max_train_steps": 10**6}.items()
)


def table(output: str) -> dict[str, tuple]:
    return {name: figures for name, *figures in imports_table(output).rows}


@pytest.mark.extended
def test_a_start_is_followed_to_its_first_step_and_ended_there(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    start = start_of((sys.executable, str(SCRIPT), "--use_cpu", *TINY))  # by itself it would go on for a million
    assert 0 < start.ready < start.evaluated <= start.stepped
    assert "world size 1" in start.output
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_first_step_is_told_with_what_it_printed():
    with pytest.raises(RuntimeError, match=r"before its first step(.|\n)*no such thing"):
        start_of((sys.executable, "-c", "raise SystemExit('no such thing')"))


def test_all_processes_of_a_start_are_ended_with_it(tmp_path):
    orphan = tmp_path / "pid"
    child = f"import os, time; open({str(orphan)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    wait = f"while not (os.path.exists({str(orphan)!r}) and open({str(orphan)!r}).read()): time.sleep(0.01)"
    parent = f"import os, subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n{wait}"
    with pytest.raises(RuntimeError):
        start_of((sys.executable, "-c", parent))
    for _ in range(1000):
        if not is_running(int(orphan.read_text())):
            return
        time.sleep(0.01)
    pytest.fail("the child lives on")


def is_running(pid: int) -> bool:
    """An orphan that has died may stay a zombie where nobody reaps it."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        os.kill(pid, 0)
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_imports_are_summed_by_package_and_begin_after_torch_and_transformers():
    lines = """import time: self [us] | cumulative | imported package
import time:   9000000 |    9000000 | torch
torch and transformers are imported
import time:     30000 |      30000 |     scipy.sparse
import time:     40000 |      70000 |   scipy
step 1 of something | 7 | else
import time:     50000 |     120000 | sklearn
import time:       100 |        100 | joblib
import time:       200 |        200 | rich"""
    figures = table(lines)
    assert list(figures) == ["scipy", "sklearn", "2 others", "all"]
    assert figures["scipy"] == [pytest.approx(0.07), 2]
    assert figures["sklearn"] == [pytest.approx(0.05), 1]
    assert figures["2 others"] == [pytest.approx(0.0003), 2]
    assert figures["all"] == [pytest.approx(0.1203), 5]


@pytest.mark.extended
def test_of_torch_and_transformers_themselves_the_profiled_demo_says_nothing():
    output = start_of((*PROFILED_DEMO, "--use_cpu", *TINY)).output
    assert {"mimae", "matplotlib"} <= table(output).keys()
    before, _, told = output.partition(END_OF_IMPORTS)
    for module in ("torch", "transformers"):
        line = re.compile(rf"\| +{re.escape(module)}$", re.MULTILINE)
        assert line.search(before)
        assert not line.search(told)  # but some of their modules the demo is the first to import


def test_a_row_holds_the_medians_and_what_is_beyond_the_import():
    starts = [Start(5.0, 7.0, 8.0, ""), Start(4.0, 7.0, 9.0, ""), Start(6.0, 8.0, 30.0, "")]
    rows = starts_table([3.0, 2.0, 40.0], {"demo": starts}).rows
    assert rows == [("torch and transformers, imported", None, None, 3.0, None), ("demo", 5.0, 7.0, 9.0, 6.0)]


@pytest.mark.extended
def test_the_bar_is_what_the_launched_demo_takes_beyond_the_imports():
    measurement = measure(torch.device("cpu"), quick=True)
    (_, _, _, imported, _), (name, *_, stepped, beyond) = measurement.tables[0].rows
    (bar,) = measurement.bars
    assert "accelerate launch" in name
    assert bar.figure == beyond == stepped - imported
    assert bar.figure > 0
