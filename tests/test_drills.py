"""The drills of `make drills`, in small: fewer kills, and processes that are forked, not launched."""

from functools import partial

import pytest

from mimae.drills import damage, images, kills, network, order, processes, report, saving, sets, shuffling, storage
from mimae.drills.__main__ import DRILLS
from mimae.drills.outcome import Outcome, as_list
from mimae.drills.runs import Run

QUICK = {
    "kills": partial(kills.kills_in_a_run, kills=3),
    "saves": partial(kills.kills_in_saves, kills=6),
    "signals": kills.stop_signals,
    "full_disk": storage.full_disk,
    "damage": damage.damage_to_each_file,
    **{f"resumes, {kind}": partial(order.resumes, kind=kind) for kind in sets.KINDS},
    "orders": partial(order.orders, world_sizes=(1, 2), workers=(0, 2)),
    "world_sizes": order.world_sizes,
    "killed_process": processes.one_of_two_killed,
    "shards, uneven": partial(images.uneven_shards, sizes=(700, 30, 500, 7)),
    "shards, one": partial(images.uneven_shards, sizes=(700,)),
    "bad_images": images.bad_images,
    "odd_formats": images.odd_formats,
    "faults": network.faults,
    "outage": partial(network.outage, num_processes=2),
    "nan": processes.not_a_number_on_one,
    "gate": processes.losses_on_two_sides_of_the_gate,
    "bf16": processes.in_bfloat16,
    "fp16": processes.in_float16,
    "lock": processes.two_runs_in_one_folder,
    "pickles": storage.files_that_execute,
    "archives": storage.names_that_climb,
    "gradients": partial(processes.gradients, world_sizes=(2,), accumulations=(1, 3)),
    "travel": shuffling.travel,
    "memory": shuffling.memory,
    "stall": partial(saving.stall, preset="vit-tiny"),
}


def test_each_drill_has_a_quick_version():
    assert {name.split(",")[0] for name in QUICK} == DRILLS.keys()


@pytest.mark.parametrize("name", QUICK)
def test_drill(name, tmp_path, forked_runs):
    for outcome in as_list(QUICK[name](tmp_path)):
        if outcome.skipped:
            pytest.skip(outcome.skipped)
        assert outcome.passed, outcome


def test_a_run_that_saw_or_learnt_something_else_is_not_equal(tmp_path, forked_runs):
    # a control: a comparison that cannot fail would say nothing
    flags = {"max_train_steps": 3, "seed": 0}
    whole, *others = (
        Run(tmp_path / str(number), {**flags, **other}).finish()
        for number, other in enumerate([{}, {"seed": 1}, {"adam_beta1": 0.8}])
    )
    other_order, other_weights = (other.compared_with(whole) for other in others)
    assert (other_order.same_order, other_order.same_weights) == (False, False)
    assert other_order.lost == other_order.repeated > 0
    assert other_weights == (0, 0, True, False)


def test_the_page_adds_up_over_drills_and_names_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "OUTCOMES", tmp_path / "outcomes.json")
    monkeypatch.setattr(report, "REPORT", tmp_path / "page.md")
    report.keep("a", [Outcome("killing", True, {"kills": 2, "recovered": 2, "order hash": {"1": "x", "2": "x"}})], 1.0)
    report.keep("b", [Outcome("killing more", False, {"kills": 3, "recovered": 1, "hangs": 1})], 1.0)
    report.keep("b", [Outcome("killing more", False, {"kills": 4, "recovered": 1, "hangs": 1})], 1.0)
    report.keep("c", [Outcome("the sky falls", False, skipped="there is none here")], 1.0)
    page = (tmp_path / "page.md").read_text()
    assert "| kills run / recovered | 6 / 3 |" in page
    assert "| different orders of samples | 1, in 2 combinations" in page
    assert "| hangs | 1 |" in page
    assert "| `b`: killing more | **no** |" in page
    assert "| `c`: the sky falls | skipped | there is none here |" in page
