"""The drills of `make drills`, in small: fewer kills, and processes that are forked, not launched."""

import json

import pytest

from mimae.drills.apparatus.comparing import compare
from mimae.drills.apparatus.runs import Run
from mimae.drills.catalogue import drills
from mimae.drills.outcome import Outcome
from mimae.drills.report import Report

# of a drill that `make test` does in a smaller form: the other sources, signal, number of shards and of processes
VARIANTS = {
    *("resumes_folder", "resumes_streamed_parquet", "resumes_streamed_WebDataset"),
    *("sigusr1", "one_shard", "outage_for_two"),
}


@pytest.mark.parametrize(
    "drill",
    [
        pytest.param(drill, id=name, marks=[pytest.mark.extended] if name in VARIANTS else [])
        for name, drill in drills(quick=True).items()
    ],
)
def test_drill(drill, tmp_path, forked_runs):
    outcome = drill(tmp_path)
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert outcome.passed, outcome
    assert json.loads(json.dumps(vars(outcome)))["passed"] is True  # as the report keeps it


def test_what_is_left_to_the_second_lane_is_a_drill():
    assert VARIANTS.issubset(drills(quick=True))


def test_a_run_that_saw_or_learnt_something_else_is_not_equal(tmp_path, forked_runs):
    # a control: a comparison that cannot fail would say nothing
    flags = {"max_train_steps": 3, "seed": 0}
    whole, *others = (
        Run(tmp_path / str(number), {**flags, **other}).finish()
        for number, other in enumerate([{}, {"seed": 1}, {"adam_beta1": 0.8}])
    )
    other_order, other_weights = (compare(other, whole) for other in others)
    assert (other_order.same_order, other_order.same_weights, other_order.same_metrics) == (False, False, False)
    assert other_order.lost == other_order.repeated > 0
    assert other_weights == (0, 0, True, False, False)


def test_the_page_adds_up_over_drills_and_says_what_failed_or_was_not_run(tmp_path):
    page = Report(["a", "b", "c", "d"], 2, outcomes=tmp_path / "outcomes.json", page=tmp_path / "page.md")
    page.keep("b", Outcome("killing more", False, {"kills": 3, "recovered": 1, "hangs": 1}), 1.0)
    page.keep("a", Outcome("killing", True, {"kills": 2, "recovered": 2, "order hash": {"1": "x", "2": "x"}}), 1.0)
    page.keep("c", Outcome("the sky falls", False, skipped="there is none | here\n"), 1.0)
    page.keep("b", Outcome("killing more", False, {"kills": 4, "recovered": 1, "hangs": 1}), 1.0)
    text = (tmp_path / "page.md").read_text()
    assert page.has_failed
    assert "| drills passed / failed / skipped, of | 1 / 1 / 1, of 4 |" in text
    assert "| kills run / recovered | 6 / 3 |" in text
    assert "| samples lost / repeated | not measured / not measured |" in text
    assert "| 1, in 2 |" in text
    assert "| hangs | 1 |" in text
    assert "| `b`: killing more | **no** | kills: 4; recovered: 1; hangs: 1 |" in text
    assert "| `c`: the sky falls | skipped | there is none \\| here |" in text
    assert text.index("`a`: killing") < text.index("`b`: killing")
