"""Where one of two real processes (gloo) fails, both end, and know why. This file is also what each process runs."""

import json
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator, PartialState
from forking import run_forked
from runs import SCRIPT, flags

from mimae.training.metrics import TrackedMetrics
from mimae.training.processes import main_process_first, on_main_process, together


def failing_on(*ranks: int):
    """A computation that fails on these processes, and gives the rank on others."""
    rank = PartialState().process_index
    if rank in ranks:
        raise FileNotFoundError(f"at first a long story\nno images in the folder of process {rank}")
    return rank


def opening(folder: Path, *ranks: int) -> list[str]:
    """A cache that the main process fills, and what each process finds in it when it comes."""
    rank = PartialState().process_index
    found = sorted(path.name for path in folder.iterdir())
    (folder / f"of-{rank}").touch()
    failing_on(*ranks)
    return found


def write_into_a_folder(folder: Path):
    """Metrics, into a file that is none."""
    (folder / "metrics.jsonl").mkdir(exist_ok=True)
    TrackedMetrics(folder, Accelerator(cpu=True), loss_terms={}, total_steps=1).write(1, {"loss": 1.0})


CASES = {
    "value": lambda folder: on_main_process(lambda: {"from": failing_on()}),
    "error of the main process": lambda folder: on_main_process(lambda: failing_on(0)),
    "error of another": lambda folder: together(lambda: failing_on(1)),
    "errors of both": lambda folder: together(lambda: failing_on(0, 1)),
    "main process first": lambda folder: main_process_first(lambda: opening(folder)),
    "main process first, and it fails": lambda folder: main_process_first(lambda: failing_on(0)),
    "main process first, and the other fails": lambda folder: main_process_first(lambda: failing_on(1)),
    "metrics that cannot be written": write_into_a_folder,
    "value again": lambda folder: on_main_process(lambda: failing_on()),
}


def run_process(folder: Path) -> None:
    """Writes down what came of each case: a value, or the error's class and words."""
    rank = PartialState(cpu=True).process_index
    outcomes = {}
    for name, case in CASES.items():
        own = folder / name.replace(" ", "-")
        own.mkdir(exist_ok=True)
        PartialState().wait_for_everyone()
        try:
            outcomes[name] = case(own)
        except Exception as error:
            outcomes[name] = [type(error).__name__, str(error)]
    (folder / f"{rank}.json").write_text(json.dumps(outcomes))
    PartialState().destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict]:
    """Of the two processes."""
    folder = tmp_path_factory.mktemp("processes")
    result = run_forked(Path(__file__), [str(folder)], num_processes=2)
    assert result.returncode == 0, result.output
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def words(rank: int) -> str:
    return (
        f"process {rank} has failed, see its own words: FileNotFoundError: no images in the folder of process {rank}"
    )


def own_error(rank: int) -> list[str]:
    return ["FileNotFoundError", f"at first a long story\nno images in the folder of process {rank}"]


def test_what_the_main_process_computes_all_get(outcomes):
    assert [each["value"] for each in outcomes] == [{"from": 0}] * 2


@pytest.mark.parametrize("name", ["error of the main process", "main process first, and it fails"])
def test_an_error_of_the_main_process_reaches_the_other_in_one_line(outcomes, name):
    assert [each[name] for each in outcomes] == [own_error(0), ["OtherProcessError", words(0)]]


@pytest.mark.parametrize("name", ["error of another", "main process first, and the other fails"])
def test_an_error_of_another_process_reaches_the_main_one(outcomes, name):
    assert [each[name] for each in outcomes] == [["OtherProcessError", words(1)], own_error(1)]


def test_each_process_tells_its_own_error_where_both_fail(outcomes):
    assert [each["errors of both"] for each in outcomes] == [own_error(0), own_error(1)]


def test_the_main_process_opens_first_and_the_other_finds_what_it_left(outcomes):
    assert [each["main process first"] for each in outcomes] == [[], ["of-0"]]


def test_metrics_that_cannot_be_written_end_both(outcomes):
    first, second = (each["metrics that cannot be written"] for each in outcomes)
    assert "could not write" in first[1]
    assert second[0] == "OtherProcessError"
    assert "could not write" in second[1]


def test_after_all_that_the_processes_still_understand_each_other(outcomes):
    assert [each["value again"] for each in outcomes] == [0, 0]


def test_a_run_of_two_whose_images_are_not_there_ends_with_the_reason_on_both(tmp_path):
    run = run_forked(SCRIPT, flags(tmp_path / "run", train_dir=tmp_path / "nowhere"), num_processes=2)
    assert run.returncode == 1
    assert "nowhere" in run.output
    assert "OtherProcessError: process 0 has failed" in run.output
    assert "closed by peer" not in run.output


if __name__ == "__main__":
    run_process(Path(sys.argv[1]))
