"""Benchmarks compare what computes the same, and the page says of each bar what was measured, and where."""

import json

import pytest
import torch

from mimae.benchmarks.__main__ import main
from mimae.benchmarks.candidates import CANDIDATES
from mimae.benchmarks.measurement import Bar, Measurement, Table, record_of, write_record
from mimae.benchmarks.measuring import ratio, take_turns
from mimae.benchmarks.models.contestants import PRECISIONS
from mimae.benchmarks.models.peers import PEERS, check_peers, plain_config
from mimae.benchmarks.pretrain_step import flops_per_view
from mimae.benchmarks.report import write_page

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_every_peer_computes_our_loss_on_our_weights():
    found = check_peers(plain_config("vit-tiny"), list(PEERS), CPU, tolerance=1e-5)
    assert [each.peer for each in found] == list(PEERS)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch, name):
    take = PEERS[name].take

    def take_and_change(self, plain):
        take(self, plain)
        with torch.no_grad():
            max(self.parameters(), key=lambda parameter: parameter.numel()).mul_(1.5)

    monkeypatch.setattr(PEERS[name], "take", take_and_change)
    with pytest.raises(AssertionError, match=f"{name} computes another loss"):
        check_peers(plain_config("vit-tiny"), [name], CPU, tolerance=1e-5)


def test_operations_of_a_view_are_the_known_ones():
    assert flops_per_view("vit-base") == pytest.approx(58.7e9, rel=0.01)  # attention and projections, three passes


def test_contestants_are_called_in_turn_and_the_warm_up_is_not_counted():
    calls = []
    seconds = take_turns(
        {name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2, warm_up=1, device=CPU
    )
    assert calls in (list("abbaab"), list("baabba"))
    assert {name: len(each) for name, each in seconds.items()} == {"a": 2, "b": 2}


def test_a_ratio_is_the_median_over_the_rounds():
    assert ratio({"peer": [2.0, 9.0, 8.0], "ours": [1.0, 3.0, 2.0]}, "peer", "ours") == 3.0


def measurement(**figures):
    bars = [
        Bar("GPU, images", 100, figures.get("gpu"), "images/s"),
        Bar("CPU, cost", 3, figures.get("cpu"), "%", True),
    ]
    return Measurement("Steps.", [Table("Rows", ("", "x"), [["a|b", 1.234567], ["none", None]])], bars)


def test_the_page_shows_each_bar_with_the_figure_of_the_machine_that_measured_it(tmp_path, monkeypatch):
    monkeypatch.setattr("mimae.benchmarks.measurement.device_name", lambda device: f"some {device.type}")
    for device, figures in ((CPU, {"cpu": 3.5}), (GPU, {"gpu": 120.0})):
        write_record(tmp_path / "records", record_of("pretrain_step", measurement(**figures), device), device)
    write_page(tmp_path / "records", tmp_path / "page.md")
    lines = (tmp_path / "page.md").read_text().splitlines()
    (gpu,) = [line for line in lines if line.startswith("| GPU, images")]
    (cpu,) = [line for line in lines if line.startswith("| CPU, cost")]
    assert "| at least 100 images/s | 120 images/s | yes | some cuda" in gpu
    assert "| at most 3 % | 3.5 % | **no** | some cpu" in cpu


def test_a_bar_that_nothing_has_measured_says_so(tmp_path):
    write_record(tmp_path / "records", record_of("pretrain_step", measurement(cpu=1.0), CPU), CPU)
    write_page(tmp_path / "records", tmp_path / "page.md")
    assert "| GPU, images | at least 100 images/s | not measured |" in (tmp_path / "page.md").read_text()


@pytest.mark.extended
def test_the_step_is_measured_in_small(tmp_path, capsys):
    assert main(["pretrain_step", "--quick", "--output_dir", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "performance" / "pretrain_step-cpu.json").read_text())
    measured = {bar["bar"]: bar["figure"] for bar in record["bars"]}
    assert all((figure is None) == name.startswith("GPU") for name, figure in measured.items())
    for text in (capsys.readouterr().out, (tmp_path / "performance.md").read_text()):
        assert "**mimae** MI-MAE, N = 10" in text
        assert "lightly" in text


def test_a_rehearsal_is_not_kept_among_the_measurements(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain_step", "--quick"])
    assert "give it an --output_dir of its own" in capsys.readouterr().err


@pytest.mark.extended
def test_candidates_are_tried_in_small(tmp_path, monkeypatch):
    monkeypatch.delitem(CANDIDATES, "compiled")  # compiling takes a minute
    assert main(["candidates", "--quick", "--output_dir", str(tmp_path)]) == 0
    page = (tmp_path / "performance.md").read_text()
    assert all(page.count(f"| {name} |") == len(PRECISIONS) for name in CANDIDATES)
