"""The study compares equals, counts what it says, keeps what is done, and judges by the intervals that it names."""

import json
import math
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import forking
import numpy as np
import pytest
import torch
import yaml
from runs import TINY_MODEL
from sklearn.datasets import load_digits

from mimae import MIMAEConfig, MIMAEForPreTraining
from mimae.families.registry import CONFIG_CLASSES, family_named
from mimae.flags.data import DataArguments
from mimae.flags.hub import HubArguments
from mimae.flags.model import ModelArguments
from mimae.flags.pretraining import PretrainingArguments
from mimae.flags.recipes import as_argv, parse_arguments, read_recipe
from mimae.replication import __main__ as replication
from mimae.replication import costs
from mimae.replication import records as records_module
from mimae.replication import work as work_module
from mimae.replication.costs import operations, price, seconds
from mimae.replication.frozen import Poolings, compare_views, effective_rank
from mimae.replication.intervals import Interval, confidence_interval, paired_difference, prediction_interval, verdict
from mimae.replication.plan import (
    ALL,
    ARMS,
    CANDIDATES,
    CORRUPTED,
    FEW,
    FROZEN,
    GROUPS,
    MIDDLE,
    PRETRAIN,
    READINGS,
    SCALES,
    STAGES,
    Run,
    runs_of,
    tasks,
)
from mimae.replication.records import Records
from mimae.replication.report import description, write_report
from mimae.replication.rule import decide
from mimae.replication.stages import StageError
from mimae.replication.work import work
from mimae.run_mim_pretrain import build_schedule
from mimae.tests.data_helpers import write_idx

SMALL = SCALES["small"]
OUTCOME = {"metrics": {"knn": 70.0}}


# --- what is compared ------------------------------------------------------------------------------------------------


def parsed(run):
    groups = (ModelArguments, DataArguments, PretrainingArguments, HubArguments)
    argv = as_argv({"config": run.recipe, **run.flags})
    (model, _, args, _), fields, _ = parse_arguments(argv, groups, CONFIG_CLASSES, run.recipe, "")
    return args, family_named(model.model_type).build_config(model.preset, fields)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.is_trained])
def test_every_arm_has_the_same_views_steps_rates_and_warm_up(scale, name):
    run = Run(scale, ARMS[name], scale.steps[0], seed=1)
    args, config = parsed(run)
    images = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert images * config.num_views == pytest.approx(scale.views_per_step, rel=0.02)
    schedule = build_schedule(args, 60_000 // images, images, config.num_views)
    baseline, plain = parsed(Run(scale, ARMS["simmim" if run.arm.is_swin else "mae"], scale.steps[0], seed=1))
    batch = baseline.per_device_train_batch_size
    other = build_schedule(baseline, 60_000 // batch, batch, plain.num_views)
    assert schedule.total_steps == other.total_steps == scale.steps[0]
    assert schedule.warmup_steps == other.warmup_steps == scale.steps[0] // 10
    assert schedule.peak == pytest.approx(run.arm.rate * other.peak, rel=0.02)
    equal = ("weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "crop_interpolation", "seed")
    assert [getattr(args, each) for each in equal] == [getattr(baseline, each) for each in equal]


def test_random_weights_stay_random_weights():
    run = Run(SMALL, ARMS["untrained"], 1, seed=0)
    args, _ = parsed(run)
    assert args.max_train_steps == 1
    assert args.base_learning_rate < 1e-9


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_the_work_begins_with_table_1_and_its_control_and_repeats_nothing(scale):
    plan = list(tasks(scale))
    assert len({(str(run), stage) for _, run, stage in plan}) == len(plan)
    first = [(run, stage) for group, run, stage in plan if group is GROUPS[0]]
    arms = {run.arm.name for run, _ in first}
    assert arms == {"untrained", "mae", "four-masks", "mi-mae"}
    trained = {(run.steps, run.seed) for run, _ in first if run.arm.name == "mi-mae"}
    assert len(trained) == 3 * 5
    assert [stage for _, stage in first[:2]] == [PRETRAIN, FROZEN]


def test_every_comparison_is_of_arms_that_are_run():
    for group in GROUPS:
        names = {run.arm.name for run in runs_of(group, SMALL)}
        for comparison in group.comparisons:
            assert {comparison.arm, comparison.baseline} <= names


def test_four_forward_passes_of_a_quarter_make_the_same_step():
    quarter, whole = (Run(SMALL, ARMS[name], 800, 0).flags for name in ("negatives-quarter", "mi-mae"))
    assert quarter["gradient_accumulation_steps"] == 4
    assert 4 * quarter["per_device_train_batch_size"] == whole["per_device_train_batch_size"]


def test_operations_are_those_of_the_layers():
    run = Run(SMALL, ARMS["mae"], 800, 0)
    tokens, width, blocks = 17, 96, 4
    encoder = blocks * 2 * tokens * (4 * width**2 + 2 * width * 384 + 2 * tokens * width)
    decoder = 2 * 65 * (4 * 48**2 + 2 * 48 * 192 + 2 * 65 * 48) + 2 * 17 * 96 * 48 + 2 * 48 * 48 * 16
    patches = 2 * 64 * 16 * 96
    assert operations(run, PRETRAIN) == pytest.approx(3 * 800 * 256 * (encoder + decoder + patches), rel=0.05)
    assert operations(run, FROZEN) > 0.9 * 20_000 * blocks * 2 * 65 * (4 * width**2 + 2 * width * 384)


# --- what is measured ------------------------------------------------------------------------------------------------


def test_rank_counts_the_directions_that_features_use():
    random = np.random.default_rng(0)
    directions = np.linalg.qr(random.normal(size=(16, 16)))[0]
    equal = np.concatenate([directions] * 3)
    assert effective_rank(equal) == pytest.approx(16, rel=1e-3)
    collapsed = np.ones((40, 16))
    assert effective_rank(collapsed) == pytest.approx(1, abs=1e-3)
    assert effective_rank(equal[:, :1] * directions[:1]) == pytest.approx(1, abs=1e-3)


class Latents(torch.nn.Module):
    """A model whose views have the latents that it is given, batch after batch."""

    def __init__(self, *latents):
        super().__init__()
        self.latents = list(latents)
        self.config = MIMAEConfig(**TINY_MODEL)

    def forward(self, pixel_values, **kwargs):
        return type("Output", (), {"latent_vector": self.latents.pop(0), "reconstruction_loss": torch.tensor(0.5)})


def test_alignment_and_uniformity_have_their_closed_forms():
    across = torch.eye(4)[:, None].expand(4, 2, 4)  # views agree, four images at right angles
    found = compare_views(Latents(across[:2], across[2:]), [torch.zeros(2, 3, 16, 16)] * 2)
    assert found["alignment"] == pytest.approx(0, abs=1e-6)
    assert found["uniformity"] == pytest.approx(-4)  # log exp(-2 * 2)
    assert found["common_reconstruction_loss"] == pytest.approx(0.5)
    opposite = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]] * 3)
    found = compare_views(Latents(opposite), [torch.zeros(3, 3, 16, 16)])
    assert (found["alignment"], found["uniformity"]) == (pytest.approx(4), pytest.approx(0, abs=1e-6))


def test_poolings_are_the_class_token_and_the_mean_of_the_patches():
    model = MIMAEForPreTraining(MIMAEConfig(**TINY_MODEL)).eval()
    images = torch.randn(2, 3, 16, 16)
    encoder = Poolings(model, has_class_token=True)
    tokens = model.encode(images).last_hidden_state
    pooled = dict(zip(encoder.names, encoder.encode(images).pooler_output.split(32, dim=1), strict=True))
    torch.testing.assert_close(pooled["cls"], tokens[:, 0])
    torch.testing.assert_close(pooled["mean"], tokens[:, 1:].mean(dim=1))


# --- how it is judged ------------------------------------------------------------------------------------------------


def test_intervals_are_students():
    values = [1.0, 2.0, 3.0]  # mean 2, standard deviation 1; t(0.975, 2) = 4.3027
    assert confidence_interval(values).half_width == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert prediction_interval(values).half_width == pytest.approx(4.3027 * math.sqrt(4 / 3), rel=1e-4)
    assert confidence_interval([5.0]).half_width == math.inf


def test_prediction_intervals_hold_a_new_value_as_often_as_they_say():
    random = np.random.default_rng(0)
    hits = [random.normal() in prediction_interval(random.normal(size=5).tolist()) for _ in range(2000)]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.02)


def test_differences_are_paired_by_seed():
    ours, baseline = {0: 11.0, 1: 21.0, 2: 31.5, 7: 99.0}, {0: 10.0, 1: 20.0, 2: 30.0, 8: 0.0}
    difference = paired_difference(ours, baseline)
    assert (difference.n, difference.mean) == (3, pytest.approx(3.5 / 3))
    assert difference.half_width < 1  # far less than the scatter of either
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("mean", "half_width", "claim", "word"),
    [
        (1, 0.5, +1, "holds"),
        (-1, 0.5, +1, "does not hold"),
        (-1, 0.5, -1, "holds"),
        (1, 1.5, +1, "not resolved"),
        (1, math.inf, -1, "not resolved"),
        (1, 0.5, 0, "higher"),
        (-1, 0.5, 0, "lower"),
    ],
)
def test_a_verdict_follows_from_the_interval_and_the_claim(mean, half_width, claim, word):
    assert verdict(Interval(mean, half_width, 5), claim) == word


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def one_commit(monkeypatch):
    """Hundreds of records are written here; git and the versions are asked once."""
    versions = records_module.package_versions()
    monkeypatch.setattr(records_module, "source_commit", lambda: "0" * 40)
    monkeypatch.setattr(records_module, "package_versions", lambda: dict(versions))


def add(records, run, stage, **outcome):
    records.add(run, stage, {**OUTCOME, **outcome}, operations=1e9, seconds=2.0, device="here")


def test_a_result_of_other_settings_counts_for_nothing(tmp_path):
    records, run = Records(tmp_path / "small.jsonl"), Run(SMALL, ARMS["mae"], 800, 0)
    add(records, run, PRETRAIN)
    assert Records(records.path).find(run, PRETRAIN)["metrics"] == OUTCOME["metrics"]
    changed = replace(SMALL, views_per_step=512)
    assert records.find(replace(run, scale=changed), PRETRAIN) is None
    assert records.find(replace(run, seed=1), PRETRAIN) is None
    assert records.find(run, FROZEN) is None


def test_a_stage_that_fails_is_told_and_costs_no_other_run(tmp_path, monkeypatch):
    done = []

    def run_stage(run, stage, folder, machine):
        if run.arm.name == "mae" and stage == PRETRAIN:
            raise StageError("no room")
        done.append((run.arm.name, stage))
        return OUTCOME

    monkeypatch.setattr(work_module, "run_stage", run_stage)
    plan = [(GROUPS[0], Run(SMALL, ARMS[name], 800, 1), stage) for name in ("mae", "mi-mae") for stage in STAGES[:2]]
    records = Records(tmp_path / "small.jsonl")
    assert work(plan, records, tmp_path, jobs=1, machine={}, device="here") == ["no room"]
    assert done == [("mi-mae", PRETRAIN), ("mi-mae", FROZEN)]
    done.clear()
    work(plan[2:], records, tmp_path, jobs=2, machine={}, device="here")
    assert done == []


def test_what_an_earlier_start_has_taken_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(work_module, "run_stage", lambda *_: {**OUTCOME, "seconds": 1000.0})
    records, run = Records(tmp_path / "small.jsonl"), Run(SMALL, ARMS["mae"], 800, 1)
    work([(GROUPS[0], run, PRETRAIN)], records, tmp_path, jobs=1, machine={}, device="here")
    assert records.find(run, PRETRAIN)["seconds"] == 1000


@pytest.fixture
def counted(monkeypatch):
    """A page prices fifty models, each counted on its own: where the price is not the claim, all cost the same."""
    monkeypatch.setattr(costs, "_forward_operations", lambda recipe, fields: (1e6, 1e6))


@pytest.mark.usefixtures("counted")
def test_a_model_that_is_needed_again_is_priced_once_more_and_once(tmp_path):
    records = fill(tmp_path)
    rule, few, every = (
        next(group for group in GROUPS if stages == group.stages)
        for stages in ((FROZEN, FEW), (FEW,), (ALL, CORRUPTED))
    )
    prices = {group.title: operations for group, _, _, operations, _ in price(SMALL, records)}
    assert prices[GROUPS[0].title] == 0
    runs = runs_of(rule, SMALL)
    own = [(run, FROZEN) for run in runs if run.arm.name in CANDIDATES]
    assert prices[rule.title] == pytest.approx(
        sum(operations(run, stage) for run, stage in [*own, *product(runs, (PRETRAIN, FEW))])
    )
    others = [each for group in GROUPS if group.stages == (FROZEN, FEW) for each in map(str, runs_of(group, SMALL))]
    left = [run for run in runs_of(few, SMALL) if str(run) not in others]
    assert {run.arm.name for run in left} == {"mi-mae"}
    assert prices[few.title] == pytest.approx(sum(operations(run, stage) for run in left for stage in (PRETRAIN, FEW)))
    assert prices[every.title] == pytest.approx(
        sum(operations(run, stage) for run in runs_of(every, SMALL) for stage in (ALL, CORRUPTED))
    )


@pytest.mark.extended
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_every_arm_of_a_scale_has_a_price(scale):
    for arm in ARMS.values():
        run = Run(scale, arm, scale.steps[0], seed=0)
        assert operations(run, PRETRAIN) > 0, arm.name
        assert operations(run, FROZEN) > 0, arm.name


@pytest.mark.usefixtures("counted")
def test_time_that_is_left_follows_from_the_rates_of_what_is_done(tmp_path):
    records, run = Records(tmp_path / "small.jsonl"), Run(SMALL, ARMS["mae"], 800, 0)
    assert seconds(run, PRETRAIN, records) is None
    add(records, run, PRETRAIN)  # 0.5 GFLOP a second
    assert seconds(run, FROZEN, records) == pytest.approx(operations(run, FROZEN) / 0.5e9)
    assert seconds(run, PRETRAIN, records, device="elsewhere") is None
    (_, stages, left, _, hours), *_ = price(SMALL, records)
    assert left == stages - 1
    assert hours > 0


# --- the rule --------------------------------------------------------------------------------------------------------


def judge(folder, gains, budgets=(800, 1600)):
    """What the rule gives where candidates are ahead of MAE by so much: (fine-tuned, linear on the class token)."""
    records = Records(folder / "small.jsonl")
    for name, steps, seed in product(("mae", *CANDIDATES), budgets, range(5)):
        few, linear = gains.get(name, (0, 0))
        noise = 0.1 * ((seed + len(name)) % 3 - 1)  # the seeds of two arms do not differ by the same
        run = Run(SMALL, ARMS[name], steps, seed)
        add(records, run, FROZEN, metrics={"linear_cls": 70 + linear + noise, "knn": 0.0})
        add(records, run, FEW, metrics={FEW: 60 + few + noise})
    return decide(SMALL, records)


simplest, second, third, last = CANDIDATES


@pytest.mark.parametrize(
    ("gains", "chosen"),
    [
        ({}, None),
        ({last: (2, 2)}, last),
        ({last: (2, 0)}, last),  # resolved on one, not resolved on the other
        ({last: (2, -1)}, None),  # resolved below 0 on the other
        ({second: (1, 1), last: (3, 3)}, last),
        ({second: (3, 3), last: (3, 3)}, second),  # a tie goes to the simpler
        ({second: (1, 1), third: (3, 3), last: (3, 3)}, third),
    ],
)
def test_the_rule_takes_the_best_reading_that_is_ahead_at_two_budgets(tmp_path, gains, chosen):
    assert judge(tmp_path, gains).chosen == chosen


def test_one_budget_decides_nothing(tmp_path):
    decision = judge(tmp_path, {last: (2, 2)}, budgets=(800,))
    assert (decision.judged, decision.passed[last], decision.chosen) == ([800], [800], None)


def test_a_budget_that_lacks_a_seed_is_not_judged(tmp_path):
    records = Records(tmp_path / "small.jsonl")
    add(records, Run(SMALL, ARMS["mae"], 800, 0), FROZEN, metrics={"linear_cls": 70.0})
    assert decide(SMALL, records).judged == []


@pytest.mark.usefixtures("counted")
def test_the_plan_and_its_rule_stand_on_the_page_before_any_result(tmp_path):
    (tmp_path / "replication").mkdir()
    write_report(tmp_path)
    page = (tmp_path / "replication.md").read_text()
    for group in GROUPS:
        assert f"| {group.title} |" in page.split("## The plan")[1].split("## Scale")[0]
    for name in CANDIDATES:
        assert f"| {name} | {ARMS[name].words} |" in page
    assert "What the rule gives" not in page


@pytest.mark.parametrize("name", [name for (_, _, gate), name in READINGS.items() if gate == "ramp"])
def test_a_ramp_is_as_long_as_the_warm_up(name):
    run = Run(SMALL, ARMS[name], 800, 0)
    args, config = parsed(run)
    assert (config.mi_gate_threshold, config.mi_ramp_steps, args.warmup_steps) == (None, 80, 80)


def test_half_the_rate_is_half_the_rate_and_nothing_else():
    whole, half = (Run(SMALL, ARMS[name], 800, 0).flags for name in ("mae", "mae-half-rate"))
    assert half == {**whole, "base_learning_rate": 2.0e-3}
    assert read_recipe(SMALL.recipe)["base_learning_rate"] == 4.0e-3


# --- the page --------------------------------------------------------------------------------------------------------


def fill(folder, scale=SMALL, gain=1.0):
    """Records of the first group as if MI-MAE were better by so much."""
    records = Records(folder / "replication" / f"{scale.name}.jsonl")
    series = {"step": [10, 20], "reconstruction_loss": [2, 1], "mi_max_loss": [3, 2], "mi_min_loss": [0, 1]}
    for run in runs_of(GROUPS[0], scale):
        level = 70 + gain * (run.arm.name == "mi-mae") + 0.1 * run.seed
        add(records, run, PRETRAIN, metrics={"mi_max_loss": 1.0, "gate_opened_at": 10}, series=series)
        add(records, run, FROZEN, metrics={"knn": level + 0.01 * (run.seed % 2), "rank": 3.0})
    return records


@pytest.mark.usefixtures("counted", "drawn")
@pytest.mark.parametrize(("gain", "word"), [(1.0, "holds"), (-1.0, "does not hold"), (0.0, "not resolved")])
def test_the_page_says_what_the_records_say(tmp_path, gain, word):
    fill(tmp_path, gain=gain)
    write_report(tmp_path)
    page = (tmp_path / "replication.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| mi-mae - mae | 819,200")]
    assert row.count(word) == 1
    assert f"{gain:+.2f} [" in row.replace("-0.00", "+0.00")
    assert "Table 3b" in page.split("### What is left")[1]  # priced
    for picture in ("", "-losses"):
        assert (tmp_path / "replication" / f"small-table-1-and-the-control-that-it-lacks{picture}.png").exists()


@pytest.mark.usefixtures("counted")
def test_what_holds_stands_first_and_groups_without_news_are_left_out(tmp_path):
    records = fill(tmp_path)
    write_report(tmp_path)
    page = (tmp_path / "replication.md").read_text()
    (row,) = [line for line in page.split("### What holds")[1].splitlines() if line.startswith("| MI-MAE (f): better")]
    assert row == "| MI-MAE (f): better than MAE: one mask, L_rec (a) | 819,200 | 5 | holds |"
    titles = [line for line in page.splitlines() if line.startswith("### ")]
    assert [title for title in titles if "Table" in title] == [f"### {GROUPS[0].title}"]
    add(records, Run(SMALL, ARMS["weights-1-1"], 1600, 0), FROZEN)
    write_report(tmp_path)
    page = (tmp_path / "replication.md").read_text()
    assert "### Table 3b: the weights" in page
    assert "| λ₂ = 1, λ₃ = 1: worse than MI-MAE (f) | 409,600 | 1 | one seed |" in page


def test_versions_of_all_records_are_told(tmp_path):
    records = fill(tmp_path)
    records.lines[0]["versions"]["torch"] = "2.11.0"
    assert f"torch 2.11.0 and {records.lines[-1]['versions']['torch']}, " in description(SMALL, records)


@pytest.mark.usefixtures("counted")
def test_the_readme_quotes_the_longest_budget_and_nothing_else_of_it_changes(tmp_path):
    fill(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- replication, small: begin -->\nlast\n<!-- replication, small: end -->\nthe end\n")
    write_report(tmp_path, readme)
    first = readme.read_text()
    assert first.startswith("# Title\n")
    assert first.endswith("-->\nthe end\n")
    assert "last" not in first
    assert "| 819,200 | 5 | 71.2" in first
    assert "(a) | 819,200 | 5 | holds |" in first
    assert "| 409,600" not in first
    write_report(tmp_path, readme)
    assert readme.read_text() == first


@pytest.mark.usefixtures("counted")
def test_random_weights_alone_are_nothing_to_tell_yet(tmp_path):
    add(Records(tmp_path / "replication" / "small.jsonl"), Run(SMALL, ARMS["untrained"], 1, 0), FROZEN)
    write_report(tmp_path)
    assert "### Table 1" not in (tmp_path / "replication.md").read_text()


@pytest.mark.usefixtures("counted")
def test_a_page_of_nothing_is_the_plan_alone(tmp_path):
    (tmp_path / "replication").mkdir()
    write_report(tmp_path)
    page = (tmp_path / "replication.md").read_text()
    assert page.count("Nothing is done yet") == len(SCALES)
    assert page.count("### What is left") == len(SCALES)


@pytest.mark.usefixtures("counted")
def test_listing_shows_plan_done_and_left(tmp_path, capsys):
    fill(tmp_path)
    assert replication.main(["--list", "--output_dir", str(tmp_path)]) == 0
    rows = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "|" in line}
    stages, done, left = (int(cell) for cell in rows[GROUPS[0].title].split("|")[2:5])
    assert (stages, left) == (done, 0)
    assert int(rows["all"].split("|")[4]) > 100


def test_an_unknown_arm_is_named(capsys):
    with pytest.raises(SystemExit):
        replication.main(["mi-mea"])
    assert "mi-mea" in capsys.readouterr().err


def test_missing_images_are_told_with_the_remedy(tmp_path):
    with pytest.raises(SystemExit, match="apt-get install dataset-fashion-mnist"):
        replication.main(["--train_dir", str(tmp_path / "none"), "--output_dir", str(tmp_path)])


# --- in earnest ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A scale of seconds, on digits as IDX files."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * 15).astype(np.uint8)
    forking.start_server()
    (tmp_path / "images").mkdir()
    for split, part in (("train", slice(0, 1437)), ("t10k", slice(1437, None))):
        write_idx(tmp_path / "images" / f"{split}-images-idx3-ubyte", images[part])
        write_idx(tmp_path / "images" / f"{split}-labels-idx1-ubyte", labels[part].astype(np.uint8))
    scale = replace(SMALL, views_per_step=64, steps=(2, 4, 6), **tiny_recipes(tmp_path))
    monkeypatch.setitem(SCALES, "small", scale)
    return scale


def tiny_recipes(folder: Path) -> dict[str, Path]:
    found = {}
    for name, model in (("recipe", TINY_MODEL), ("few", {}), ("every", {})):
        recipe = read_recipe(getattr(SMALL, name)) | model
        recipe |= {"num_train_epochs": 1, "train_fraction": 0.1} if name == "few" else {}
        found[name] = folder / f"{name}.yaml"
        found[name].write_text(yaml.safe_dump({**recipe, "mixed_precision": "no"}))
    return found


@pytest.mark.usefixtures("counted")
def test_a_study_is_done_once_goes_on_where_it_was_and_can_be_run_again(tiny, tmp_path, monkeypatch, capsys):
    group = replace(GROUPS[0], seeds=2, budgets=(MIDDLE,), stages=(FROZEN, FEW), further=())
    monkeypatch.setattr("mimae.replication.plan.GROUPS", (group,))
    monkeypatch.setattr("mimae.replication.report.GROUPS", (group,))
    monkeypatch.setattr(replication, "GROUPS", (group,))
    folders = ["--train_dir", str(tmp_path / "images"), "--work_dir", str(tmp_path / "work")]
    flags = [*folders, "--output_dir", str(tmp_path / "docs"), "--jobs", "2"]

    assert replication.main(["mi-mae", *flags]) == 0
    lines = [json.loads(line) for line in (tmp_path / "docs/replication/small.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 3  # seeds, stages
    frozen = [line["metrics"] for line in lines if line["stage"] == FROZEN]
    assert all(10 < metrics["knn"] < 100 and 0 < metrics["linear_cls"] < 100 for metrics in frozen)
    assert (tmp_path / "docs/replication/small-mi-mae.png").exists()
    page = (tmp_path / "docs/replication.md").read_text()
    assert "| MI-MAE (f) | 256 | 2 |" in page
    assert page.count("(replication/small-mi-mae.png)") == 1

    capsys.readouterr()
    shutil.rmtree(tmp_path / "work")
    assert replication.main(["mi-mae", *flags]) == 0
    assert "knn" not in capsys.readouterr().out  # nothing is done twice

    code = replication.main(["--again", "mi-mae", *flags])
    table = capsys.readouterr().out
    assert "95 % prediction interval" in table
    assert code == int("outside" in table)
    assert len((tmp_path / "docs/replication/small.jsonl").read_text().splitlines()) == len(lines)
