"""Labelled batches are functions of (seed, epoch), resume exactly under a real Trainer, and count every image once.

This file is also what each of two processes runs.
"""

import json
import logging
import random
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from forking import run_forked
from transformers import Trainer, TrainerCallback, TrainingArguments

from mimae.data.batches.classification import IGNORED_LABEL, ClassificationEvaluationLoader, ClassificationLoader
from mimae.data.images.augmentation import finetuning_transform, mixing, normalized, probe_transform
from mimae.data.images.decoding import decode_image
from mimae.data.images.transforms import evaluation_transform
from mimae.data.sources.opening import open_image_source
from mimae.data.sources.subsets import SubsetSource, low_shot_indices
from mimae.tests.data_helpers import jpegs, shards, write_parquet, write_tars

SIZES = (30, 13, 41)  # shards of unequal size, 84 images
GREY = {"mean": [0.5], "std": [0.5]}
COLOUR = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
EVALUATION = normalized(evaluation_transform(16), **COLOUR)


@pytest.fixture
def open_kind(tmp_path, monkeypatch):
    """Opens the same 84 images map-style, as streamed parquet or as streamed tar."""
    monkeypatch.setattr("mimae.data.sources.sharded.SAMPLES_PER_TAR_BLOCK", 8)

    def open_source(kind, images=None):
        files = (write_tars if kind == "tar" else write_parquet)(tmp_path / kind, images or shards(*SIZES))
        return open_image_source(data_files=files, streaming=kind != "map", cache_dir=str(tmp_path / "cache"))

    return open_source


KINDS = pytest.mark.parametrize("kind", ["map", "parquet", "tar"])


def training_loader(source, **options):
    """Batches of 8, with all that is random."""
    defaults = {
        "transform": finetuning_transform(16, **COLOUR),
        "num_channels": 3,
        "per_device_batch_size": 8,
        "mixing": mixing(3, 8, mixup=0.8, cutmix=1.0, label_smoothing=0.1),
        "seed": 3,
        "shuffle_window": 20,
    }
    return ClassificationLoader(source, **(defaults | options))


def plain_loader(source, **options):
    """The same, but pixels and labels say which image they are of."""
    return training_loader(source, **{"transform": EVALUATION, "mixing": None, **options})


def evaluation_loader(source, **options):
    return ClassificationEvaluationLoader(
        source, **{"transform": EVALUATION, "num_channels": 3, "batch_size": 10, **options}
    )


def epoch(loader, number=0):
    loader.set_epoch(number)
    return list(loader)


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys() == {"pixel_values", "labels"}
        assert all(torch.equal(one[key], other[key]) for key in one)


def joined(batches):
    """What the processes saw of one global batch."""
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


# Training


def test_a_batch_is_what_a_model_takes():
    source = open_image_source()
    options = {"transform": probe_transform(12, **GREY), "num_channels": 1}
    for mix, kind, shape in ((None, torch.int64, (8,)), (mixing(10, 8, mixup=1.0), torch.float32, (8, 10))):
        loader = training_loader(source, mixing=mix, **options)
        batch = next(iter(loader))
        assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
            "pixel_values": (torch.float32, (8, 1, 12, 12)),
            "labels": (kind, shape),
        }
        assert (len(loader), len(loader.dataset)) == (1437 // 8, 1437 // 8 * 8)


@KINDS
def test_workers_do_not_change_what_is_seen(open_kind, kind):
    source = open_kind(kind)
    loaders = [training_loader(source, num_workers=workers) for workers in (0, 2)]
    for number in (0, 1, 1, 0):
        assert_same(*(epoch(loader, number) for loader in loaders))


@KINDS
def test_processes_share_one_order(open_kind, kind):
    source = open_kind(kind)
    alone = epoch(plain_loader(source), 1)
    for processes in (2, 4):
        options = {"per_device_batch_size": 8 // processes, "num_processes": processes}
        parts = [epoch(plain_loader(source, process_index=rank, **options), 1) for rank in range(processes)]
        assert_same([joined(part) for part in zip(*parts, strict=True)], alone)


@KINDS
def test_every_image_is_seen_once_an_epoch_but_the_remainder_and_with_its_label(open_kind, kind):
    images = [EVALUATION(decode_image(image, 3)) for image in jpegs(84)]
    labels = [row % 3 for size in SIZES for row in range(size)]
    seen = []
    for batch in epoch(plain_loader(open_kind(kind))):
        for view, label in zip(*batch.values(), strict=True):
            (row,) = [row for row, image in enumerate(images) if torch.equal(image, view)]
            assert label == labels[row]
            seen.append(row)
    assert len(seen) == len(set(seen)) == 80


def test_an_epoch_and_a_seed_are_another_order_and_another_augmentation(open_kind):
    source = open_kind("map")
    first = epoch(training_loader(source))
    for other in (epoch(training_loader(source), 1), epoch(training_loader(source, seed=4))):
        assert not torch.equal(first[0]["pixel_values"], other[0]["pixel_values"])
    one = SubsetSource(source, [7])  # one image, so the order is the same
    views = [epoch(training_loader(one, per_device_batch_size=1, mixing=None), number) for number in (0, 1)]
    assert not torch.equal(views[0][0]["pixel_values"], views[1][0]["pixel_values"])


def test_batches_are_mixed_each_in_its_own_way(open_kind):
    batches = epoch(training_loader(open_kind("map"), mixing=mixing(3, 8, mixup=1.0)))
    shares = [{round(value, 4) for value in batch["labels"].flatten().tolist()} - {0.0, 1.0} for batch in batches]
    assert all(len(share) == 2 for share in shares if share)  # λ and 1 - λ
    assert len({max(share) for share in shares if share}) == sum(map(bool, shares)) > 5


@pytest.mark.parametrize("workers", [0, 2])
def test_the_callers_random_numbers_are_left_alone_and_have_no_say(open_kind, workers):
    source = open_kind("map")
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        runs.append(epoch(training_loader(source, num_workers=workers)))
        assert torch.equal(before[0], torch.get_rng_state())
        assert np.array_equal(before[1], np.random.get_state()[1])
        assert before[2] == random.getstate()
    assert_same(*runs)


def test_all_that_a_worker_needs_travels_to_a_spawned_one(open_kind):
    loader = training_loader(SubsetSource(open_kind("parquet"), range(20)))
    list(loader)  # opens a file, which cannot travel
    samples, collate = ForkingPickler.loads(ForkingPickler.dumps((loader.dataset, loader.collate_fn)))
    requests = list(loader.batch_sampler)
    assert_same([collate(samples.__getitems__(request)) for request in requests], epoch(loader))
    samples.bad_images.add(3)
    assert len(loader.bad_images) == 1  # in memory that is shared


def test_a_low_shot_subset_sees_only_its_images(open_kind):
    source = open_kind("parquet")
    subset = SubsetSource(source, low_shot_indices(source.labels(), 0.3, seed=0, label_names=source.label_names))
    expected = {tuple(EVALUATION(decode_image(source.read(row)[0], 3)).flatten().tolist()) for row in subset.indices}
    for number in (0, 1):
        batches = epoch(plain_loader(subset, per_device_batch_size=1), number)
        assert {tuple(batch["pixel_values"].flatten().tolist()) for batch in batches} == expected
        assert len(batches) == len(subset)


def test_labels_are_those_of_the_model(open_kind):
    source = open_kind("map")
    renamed = plain_loader(source, label_map=np.array([7, 5, 6]))
    for one, other in zip(epoch(plain_loader(source)), epoch(renamed), strict=True):
        assert torch.equal(torch.tensor([7, 5, 6])[one["labels"]], other["labels"])


def test_a_label_outside_of_the_list_is_refused_by_the_name_of_its_image(open_kind):
    source, two = open_kind("parquet"), np.arange(2)
    for loader in (plain_loader(source, label_map=two), evaluation_loader(source, label_map=two)):
        with pytest.raises(ValueError, match=r"shard-\d.parquet:\d+ has label 2, but the label list ends with 1"):
            list(loader)


def test_an_image_without_a_label_is_refused_by_its_name(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(jpegs(1)[0])
    source = open_image_source(train_dir=str(tmp_path / "photos"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"photos/1.jpg\) has no label: .*--label_column_name"):
        list(plain_loader(source, per_device_batch_size=1))


def test_fewer_images_than_one_global_batch_are_refused():
    with pytest.raises(
        ValueError, match="1437 training images are fewer than one global batch of 1440: lower per_dev"
    ):
        plain_loader(open_image_source(), per_device_batch_size=360, num_processes=4)


# Bad images

WRONG = {3: b"", 29: b"no image", 36: jpegs(1)[0][:400]}
SUBSTITUTES = {3: 4, 29: 0, 36: 37}


def damaged():
    cut, first = [], 0
    for images in shards(*SIZES):
        cut.append([WRONG.get(first + row, image) for row, image in enumerate(images)])
        first += len(images)
    return cut


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_replaced_with_its_label_and_named_once(open_kind, kind, workers, caplog):
    good = epoch(plain_loader(open_kind(kind), per_device_batch_size=12))  # all 84
    source = open_kind(kind, damaged())
    loader = plain_loader(source, per_device_batch_size=12, num_workers=workers)
    order = loader.batch_sampler.plan.order.slice(0, 0, 84).tolist()
    with caplog.at_level(logging.WARNING, logger="mimae.data.batches.classification"):
        found = joined(epoch(loader))
        epoch(loader)
    for position, index in enumerate(order):
        image, label = source.read(SUBSTITUTES.get(index, index))
        assert torch.equal(found["pixel_values"][position], EVALUATION(decode_image(image, 3)))
        assert found["labels"][position] == label
        if index not in WRONG:
            assert torch.equal(found["pixel_values"][position], joined(good)["pixel_values"][position])
    assert loader.bad_images == [source.describe(index) for index in WRONG]
    assert caplog.text.count("3 image(s) could not be decoded and were replaced") == 1
    assert source.describe(29) in caplog.text


# Going on within an epoch


@KINDS
@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_skipped_is_not_read_and_what_follows_is_the_same(open_kind, kind, workers):
    """By accelerate's own function, and then `set_epoch` as a Trainer calls it on what comes of that."""
    source = open_kind(kind)
    whole = epoch(training_loader(source), 1)
    read_block, blocks = source.read_block, []
    source.read_block = lambda block, rows: blocks.append(block) or read_block(block, rows)
    loader = training_loader(source, num_workers=workers)
    resumed = skip_first_batches(loader, 7)
    resumed.batch_sampler.batch_sampler.set_epoch(1)
    assert len(resumed) == 3
    assert_same(list(resumed), whole[7:])
    needed = source.block_of(loader.batch_sampler.plan.order.slice(1, 56, 80))
    if workers == 0 and kind != "map":
        assert sorted(blocks) == sorted(set(needed.tolist()))
        assert len(blocks) < len(source.block_sizes)


class Recorder(torch.nn.Module):
    """A linear classifier that writes down what it sees."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 10)
        self.seen = []

    def forward(self, pixel_values, labels=None):
        self.seen.append({"pixel_values": pixel_values, "labels": labels})
        logits = self.linear(pixel_values.flatten(1))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class LoaderTrainer(Trainer):
    def __init__(self, *, loader, **options):
        super().__init__(**options)
        self.loader = loader

    def get_train_dataloader(self):
        return self.loader


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == self.step


def train(output_dir, workers=0, stop_at=None, resume=None):
    """Three epochs of five batches of digits in two steps each and a rest; returns what the model saw."""
    source = SubsetSource(open_image_source(), range(83))
    loader = training_loader(
        source,
        transform=finetuning_transform(8, **GREY),
        num_channels=1,
        per_device_batch_size=16,
        mixing=mixing(10, 16, mixup=0.8),
        num_workers=workers,
    )
    args = TrainingArguments(
        str(output_dir),
        num_train_epochs=3,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    model = Recorder()
    trainer = LoaderTrainer(loader=loader, model=model, args=args, callbacks=[StopAt(stop_at)])
    trainer.train(resume_from_checkpoint=resume)
    return model


@pytest.mark.parametrize(
    ("stop_at", "batches"),
    [(5, 9), *(pytest.param(*each, marks=pytest.mark.extended) for each in ((6, 10), (2, 4)))],
)
def test_a_trainer_goes_on_at_the_very_next_batch(tmp_path, stop_at, batches):
    """Stopped within the second epoch, at its end, and within the first; workers change as well."""
    whole = train(tmp_path / "whole")
    assert len(whole.seen) == 15
    first = train(tmp_path / "run", workers=1, stop_at=stop_at)
    second = train(tmp_path / "run", resume=str(tmp_path / "run" / f"checkpoint-{stop_at}"))
    assert len(first.seen) == batches
    assert_same(first.seen + second.seen, whole.seen)
    assert torch.equal(second.linear.weight, whole.linear.weight)


# Evaluation


@KINDS
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_gives_every_image_in_order_and_then_padding(open_kind, kind, workers):
    loader = evaluation_loader(open_kind(kind), num_workers=workers)
    assert (len(loader), len(loader.dataset)) == (9, 84)
    batches = list(loader)
    assert [batch["pixel_values"].shape for batch in batches] == [(10, 3, 16, 16)] * 9
    found = joined(batches)
    expected = torch.stack([EVALUATION(decode_image(image, 3)) for image in jpegs(84)])
    assert torch.equal(found["pixel_values"][:84], expected)
    assert found["labels"].tolist() == [row % 3 for size in SIZES for row in range(size)] + [IGNORED_LABEL] * 6


@pytest.mark.parametrize("processes", [2, 3, 5, 50])
def test_processes_evaluate_batches_of_one_number_and_size_that_make_up_the_whole(open_kind, processes):
    source = open_kind("map")
    alone = joined(list(evaluation_loader(source, batch_size=1)))
    parts = [
        list(evaluation_loader(source, batch_size=3, num_processes=processes, process_index=rank))
        for rank in range(processes)
    ]
    gathered = joined([joined(batch) for batch in zip(*parts, strict=True)])  # as `gather` does it, step by step
    assert {len(batch["labels"]) for part in parts for batch in part} == {3}
    assert all(torch.equal(gathered[key][:84], alone[key]) for key in alone)
    assert (gathered["labels"][84:] == IGNORED_LABEL).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_decoded_are_not_counted_and_are_named(open_kind, workers, caplog):
    source = open_kind("tar", damaged())
    loader = evaluation_loader(source, num_workers=workers)
    with caplog.at_level(logging.WARNING, logger="mimae.data.batches.classification"):
        labels = joined(list(loader))["labels"]
        list(loader)
    assert (labels[:84] == IGNORED_LABEL).nonzero().flatten().tolist() == list(WRONG)
    assert loader.bad_images == [source.describe(index) for index in WRONG]
    assert caplog.text.count("3 image(s) could not be decoded and were left out") == 1


def test_a_random_transform_gets_its_numbers_by_the_image_alone(open_kind):
    source = open_kind("map")
    noisy = finetuning_transform(16, **COLOUR)
    first = joined(list(evaluation_loader(source, transform=noisy)))
    second = joined(list(evaluation_loader(source, transform=noisy, batch_size=7, num_workers=1)))
    assert torch.equal(first["pixel_values"][:84], second["pixel_values"][:84])


class Echo(torch.nn.Module):
    """Its logits are the first pixels of the image."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, pixel_values, labels=None):
        return {"loss": self.unused * 0, "logits": pixel_values[:, 0, :4].flatten(1)}


class EvaluatingTrainer(Trainer):
    def get_eval_dataloader(self, eval_dataset=None):
        return ClassificationEvaluationLoader(
            eval_dataset,
            transform=normalized(evaluation_transform(8, 1), **GREY),
            num_channels=1,
            batch_size=self.args.per_device_eval_batch_size,
            num_processes=self.args.world_size,
            process_index=self.args.process_index,
        )


def evaluate(output_dir):
    """What a Trainer's metrics see of 83 digits in batches of 16; written by the first process."""
    source = SubsetSource(open_image_source(split="test"), range(83))
    seen = {}

    def compute_metrics(prediction):
        counted = prediction.label_ids != IGNORED_LABEL
        seen["labels"] = prediction.label_ids[counted].tolist()
        seen["logits"] = prediction.predictions[counted].tolist()
        return {}

    args = TrainingArguments(
        str(output_dir), per_device_eval_batch_size=16, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = EvaluatingTrainer(model=Echo(), args=args, compute_metrics=compute_metrics)
    trainer.evaluate(source)
    seen["world_size"] = args.world_size
    if trainer.is_world_process_zero():
        Path(output_dir, "seen.json").write_text(json.dumps(seen))
    return seen


def test_a_trainer_on_two_processes_counts_every_image_once_and_in_order(tmp_path):
    alone = evaluate(tmp_path)
    source = open_image_source(split="test")
    assert alone["labels"] == source.labels()[:83].tolist()
    assert len({tuple(row) for row in alone["logits"]}) > 75  # the first rows tell nearly all digits apart
    result = run_forked(Path(__file__), [str(tmp_path)], num_processes=2)
    assert result.returncode == 0, result.output
    together = json.loads((tmp_path / "seen.json").read_text())
    assert together == alone | {"world_size": 2}


if __name__ == "__main__":
    evaluate(sys.argv[1])
