"""What is seen is a function of (seed, epoch, index), whatever loads it; bad images change nothing else."""

import logging
import multiprocessing
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mimae.data.batches.loaders import evaluation_batches
from mimae.data.images.decoding import decode_image
from mimae.data.images.transforms import evaluation_transform
from mimae.data.order import augmentation_seed
from mimae.data.sources.opening import ArraySource, open_image_source
from mimae.drills.apparatus.serving import serve_folder
from mimae.tests.data_helpers import (
    encode,
    jpegs,
    photograph,
    pretraining_loader,
    shards,
    take,
    write_parquet,
    write_tars,
)

SIZES = (30, 13, 41)  # shards of unequal size, 84 images


@pytest.fixture
def open_kind(tmp_path, monkeypatch):
    """Opens the same 84 images map-style, as streamed parquet or as streamed tar."""
    monkeypatch.setattr("mimae.data.sources.sharded.SAMPLES_PER_TAR_BLOCK", 8)

    def open_source(kind):
        write = write_tars if kind == "tar" else write_parquet
        files = write(tmp_path / kind, shards(*SIZES))
        return open_image_source(data_files=files, streaming=kind != "map", cache_dir=str(tmp_path / "cache"))

    return open_source


KINDS = pytest.mark.parametrize("kind", ["map", "parquet", "tar"])


TENSORS = ("pixel_values", "noise", "index", "epoch")


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in TENSORS:
            assert torch.equal(one[key], other[key]), key
        assert one["bad_images"] == other["bad_images"]


def joined(batches):
    """Joins what the processes saw of one global batch."""
    tensors = {
        key: torch.cat([batch[key] for batch in batches]) for key in ("pixel_values", "noise", "index", "epoch")
    }
    return tensors | {"bad_images": [bad for batch in batches for bad in batch["bad_images"]]}


# One order for all


def test_a_batch_is_what_the_contract_says():
    loader = pretraining_loader(open_image_source(), num_channels=1, noise_shape=(4, 16))
    batch = next(loader.batches())
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items() if key != "bad_images"} == {
        "pixel_values": (torch.uint8, (8, 1, 32, 32)),
        "noise": (torch.float32, (8, 4, 16)),
        "index": (torch.int64, (8,)),
        "epoch": (torch.int64, (8,)),
    }
    assert batch["bad_images"] == []
    assert (loader.num_samples, loader.global_batch_size, loader.samples_used) == (1437, 8, 1432)


@KINDS
def test_workers_do_not_change_what_is_seen(open_kind, kind):
    source = open_kind(kind)
    batches = [take(pretraining_loader(source, num_workers=workers).batches(), 13) for workers in (0, 2)]
    assert_same(*batches)


@KINDS
def test_processes_share_one_order(open_kind, kind):
    source = open_kind(kind)
    alone = take(pretraining_loader(source).batches(), 13)
    for processes in (2, 4):
        options = {"per_device_batch_size": 8 // processes, "num_processes": processes}
        parts = [
            take(pretraining_loader(source, process_index=rank, **options).batches(), 13) for rank in range(processes)
        ]
        assert_same([joined(part) for part in zip(*parts, strict=True)], alone)


@KINDS
def test_every_image_is_seen_once_an_epoch_but_the_remainder(open_kind, kind):
    loader = pretraining_loader(open_kind(kind), images_per_step=16)
    batches = take(loader.batches(), 20)
    assert loader.samples_used == 80
    for epoch in (0, 1):
        seen = torch.cat([batch["index"] for batch in batches[10 * epoch : 10 * epoch + 10]])
        assert len(seen.unique()) == 80
        assert all((batch["epoch"] == epoch).all() for batch in batches[10 * epoch : 10 * epoch + 10])
        assert seen.tolist() == loader.order.slice(epoch, 0, 80).tolist()


@KINDS
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_equals_one_never_stopped(open_kind, kind, workers):
    """Mid-epoch, at an epoch's end, in a later epoch; the number of workers changes as well."""
    source = open_kind(kind)
    whole = take(pretraining_loader(source, num_workers=2 - workers).batches(), 24)
    per_epoch = 84 // 8
    for batches_seen in (3, per_epoch, per_epoch + 7):
        epoch, batch = divmod(batches_seen, per_epoch)
        resumed = pretraining_loader(source, num_workers=workers).batches(epoch, batch * 8)
        assert_same(take(resumed, 24 - batches_seen), whole[batches_seen:])
    at_the_end = pretraining_loader(source).batches(0, per_epoch * 8)
    assert_same(take(at_the_end, 2), whole[per_epoch : per_epoch + 2])


@pytest.mark.parametrize("write", [write_parquet, write_tars])
def test_over_http_with_workers_and_a_resume_it_is_the_same(tmp_path, write):
    files = write(tmp_path / "data", shards(*SIZES))
    cache = str(tmp_path / "cache")
    here = pretraining_loader(open_image_source(data_files=files, streaming=True, cache_dir=cache))
    expected = take(here.batches(), 14)
    with serve_folder(tmp_path / "data") as url:
        urls = [f"{url}/{file.rsplit('/')[-1]}" for file in files]
        source = open_image_source(data_files=urls, streaming=True, cache_dir=cache)
        assert source.fingerprint == here.source.fingerprint
        assert_same(take(pretraining_loader(source, num_workers=2).batches(), 5), expected[:5])
        assert_same(take(pretraining_loader(source).batches(0, 40), 9), expected[5:])


# Randomness


def test_augmentation_and_noise_belong_to_the_sample_and_not_to_its_batch():
    source = open_image_source()
    by_index = {}
    for batch_size in (8, 5):
        loader = pretraining_loader(source, num_channels=1, per_device_batch_size=batch_size)
        for batch in take(loader.batches(), 80 // batch_size):
            for index, image, noise in zip(
                batch["index"].tolist(), batch["pixel_values"], batch["noise"], strict=True
            ):
                first = by_index.setdefault(index, (image, noise))
                assert torch.equal(first[0], image)
                assert torch.equal(first[1], noise)
    assert len(by_index) == 80


def test_an_epoch_brings_new_crops_and_noise():
    source = ArraySource(np.array(photograph().resize((64, 64)))[None], None, name="one")
    loader = pretraining_loader(source, per_device_batch_size=1)
    first, second = take(loader.batches(), 2)
    assert first["index"].tolist() == second["index"].tolist() == [0]
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    assert not torch.equal(first["noise"], second["noise"])


def test_the_transform_cannot_move_the_noise():
    source = open_image_source()
    plain = next(pretraining_loader(source, num_channels=1, transform=evaluation_transform(32)).batches())
    assert torch.equal(plain["noise"], next(pretraining_loader(source, num_channels=1).batches())["noise"])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_callers_random_numbers_are_left_alone_and_have_no_say(workers):
    loader = pretraining_loader(open_image_source(), num_channels=1, num_workers=workers)
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        runs.append(take(loader.batches(), 3))
        assert torch.equal(before[0], torch.get_rng_state())
        assert np.array_equal(before[1], np.random.get_state()[1])
        assert before[2] == random.getstate()
    assert_same(*runs)


HOST = """
import atexit, multiprocessing, signal, time

def hear(*_):
    heard.append(True)

def look():  # after the loaders' own hook, and before multiprocessing ends what is left
    print("children:", [each is child for each in multiprocessing.active_children()])
    print("handler:", signal.getsignal(signal.SIGCHLD) is hear)
    heard.clear()
    child.terminate()
    child.join()
    print("end:", child.exitcode, heard)

heard = []
signal.signal(signal.SIGCHLD, hear)
child = multiprocessing.Process(target=time.sleep, args=(300,), daemon=True)
child.start()
atexit.register(look)

from accelerate import skip_first_batches
from mimae.data.batches.loaders import evaluation_batches
from mimae.data.batches.workers import GuestLoader
from mimae.data.images.transforms import evaluation_transform
from mimae.data.sources.opening import open_image_source
from mimae.tests.data_helpers import pretraining_loader

source, transform = open_image_source(), evaluation_transform((8, 8))
options = {"transform": transform, "num_channels": 1, "batch_size": 4, "num_workers": 1}
print("images:", sum(len(batch["labels"]) for batch in evaluation_batches(source, indices=range(8), **options)))
batches = pretraining_loader(source, num_channels=1, num_workers=1).batches()
next(batches)
# one of accelerate's making, of what ours was made of
numbers = GuestLoader([0, 1, 2, 3], num_workers=1, batch_size=1, persistent_workers=True)
rest = iter(skip_first_batches(numbers, 1))
next(rest)
print("handler:", signal.getsignal(signal.SIGCHLD) is hear, len(multiprocessing.active_children()))
"""
HEARD = """images: 8
handler: True 3
children: [True]
handler: True
end: -15 [True]
"""


def test_a_program_ends_with_loaders_open_and_keeps_its_own_child_and_handler_of_ends_of_children():
    """At the end of the program the loaders' workers, which ignore the signal by which they would otherwise be ended,
    are gone, and the program's child is still its own to end."""
    result = subprocess.run([sys.executable, "-c", HOST], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, HEARD, "")


def test_a_worker_that_is_killed_is_an_error_of_the_batch_that_is_waited_for():
    batches = pretraining_loader(open_image_source(), num_channels=1, num_workers=1).batches()
    next(batches)
    (worker,) = set(multiprocessing.active_children())
    worker.kill()
    worker.join()  # here torch's handler would raise
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        take(batches, 10)


def test_another_seed_is_another_run():
    source = open_image_source()
    first, second = (next(pretraining_loader(source, num_channels=1, seed=seed).batches()) for seed in (0, 1))
    assert not torch.equal(first["index"], second["index"])


# What is read


def count_reads(source):
    read_block, blocks = source.read_block, []
    source.read_block = lambda block, rows: blocks.append(block) or read_block(block, rows)
    return blocks


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_an_epoch_reads_each_block_once_and_keeps_a_window(open_kind, kind):
    source = open_kind(kind)
    loader = pretraining_loader(source, per_device_batch_size=6)  # 84 = 14 batches, which straddle windows
    blocks = count_reads(source)
    batches = loader.batches()
    samples = batches._dataset_fetcher.dataset
    for _ in range(14):
        next(batches)
        assert len(samples.read_blocks.kept) <= 2 * 20
    assert sorted(blocks) == list(range(len(source.block_sizes)))
    assert not samples.read_blocks.kept


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_resume_reads_only_the_blocks_still_needed(open_kind, kind):
    source = open_kind(kind)
    loader = pretraining_loader(source, per_device_batch_size=6)
    needed = set(source.block_of(loader.order.slice(1, 60, 84)).tolist())
    blocks = count_reads(source)
    take(loader.batches(1, 60), 4)
    assert sorted(blocks) == sorted(needed)
    assert len(needed) < len(source.block_sizes)


def test_two_workers_keep_between_them_what_one_would(open_kind):
    """Each keeps of a block only the rows of its own batches."""
    source = open_kind("parquet")
    loader = pretraining_loader(source, per_device_batch_size=6, num_workers=2)
    samples = loader.batches()._dataset
    kept = []
    for worker in range(2):
        requests = [request for request, _ in zip(samples.plan.requests(0, 0), range(14), strict=False)][worker::2]
        reader = type(samples.read_blocks)(source, samples.plan)
        reader(requests[0])
        kept.append(set(reader.kept))
        for request in requests[1:]:
            reader(request)
        assert not reader.kept
    assert not kept[0] & kept[1]


# Bad images


WRONG = {
    3: (jpegs(1)[0][:400], "truncated"),
    11: (b"", "empty"),
    29: (b"<!doctype html><title>429 Too Many Requests</title>", "not an image"),  # the last row of its shard
    35: (b"\x93NUMPY\x01\x00v\x00", "not an image"),
    36: (encode(Image.new("F", (2, 2)), "TIFF"), "floating-point"),
}
SUBSTITUTES = {3: 4, 11: 12, 29: 0, 35: 37, 36: 37}


@pytest.fixture
def open_damaged(tmp_path):
    def open_source(kind):
        damaged, first = [], 0
        for images in shards(*SIZES):
            damaged.append([WRONG.get(first + row, (image,))[0] for row, image in enumerate(images)])
            first += len(images)
        write = write_tars if kind == "tar" else write_parquet
        files = write(tmp_path / kind, damaged)
        return open_image_source(data_files=files, streaming=True, cache_dir=str(tmp_path / "cache"))

    return open_source


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_counted_and_named_and_nothing_else_moves(open_kind, open_damaged, kind, workers):
    good = take(pretraining_loader(open_kind(kind), per_device_batch_size=12).batches(), 7)  # all 84
    source = open_damaged(kind)
    found = take(pretraining_loader(source, per_device_batch_size=12, num_workers=workers).batches(), 7)
    reported = {bad["index"]: bad for batch in found for bad in batch["bad_images"]}
    assert reported.keys() == WRONG.keys()
    for index, (_, reason) in WRONG.items():
        bad = reported[index]
        assert bad["image"] == source.describe(index)
        assert bad["substitute"] == source.describe(SUBSTITUTES[index])
        assert bad["epoch"] == 0
        assert reason in bad["reason"].lower()
    for one, other in zip(good, found, strict=True):
        assert torch.equal(one["index"], other["index"])
        assert torch.equal(one["noise"], other["noise"])
        right = torch.tensor([index not in WRONG for index in one["index"].tolist()])
        assert torch.equal(one["pixel_values"][right], other["pixel_values"][right])


def test_a_substitute_is_cropped_as_its_place_would_have_been(open_damaged):
    loader = pretraining_loader(open_damaged("parquet"), per_device_batch_size=12)
    batches = take(loader.batches(), 7)
    place = torch.cat([batch["index"] for batch in batches]).tolist().index(3)
    torch.manual_seed(augmentation_seed(3, 0, 3))
    expected = loader.sample_options["transform"](decode_image(jpegs(84)[4], 3))
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches])[place], expected)


def test_a_folder_reports_the_paths_of_its_bad_images(tmp_path):
    for number, image in enumerate(jpegs(9)):
        path = tmp_path / "data" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image" if number == 4 else image)
    source = open_image_source(train_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    batch = next(pretraining_loader(source, per_device_batch_size=9).batches())
    (bad,) = batch["bad_images"]
    assert "a/4.jpg" in bad["image"]
    assert "a/6.jpg" in bad["substitute"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_without_one_good_image_ends_the_run_with_its_name(tmp_path, workers):
    files = write_parquet(tmp_path, [jpegs(12), [b"bad"] * 12])
    source = open_image_source(data_files=files, streaming=True, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match=r"neither .*shard-1.parquet:\d+ .* nor any image after it"):
        take(pretraining_loader(source, num_workers=workers).batches(), 3)


# Numbers that cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_batch_size": 2000}, "epoch of 1437 images is smaller than one step of 2000"),
        ({"images_per_step": 2000}, "1437 images is smaller than one step of 2000.*gradient_accumulation_steps"),
        ({"images_per_step": 12}, r"images_per_step \(12\) must be a multiple of the global batch, 8"),
        ({"samples_per_epoch": 1438}, "samples_per_epoch is 1438, but the data set has 1437"),
        ({"shuffle_window": 0}, "shuffle_window"),
        ({"seed": -1}, "seed"),
    ],
)
def test_numbers_that_cannot_be_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        pretraining_loader(open_image_source(), num_channels=1, **options)


@pytest.mark.parametrize("position", [4, -8, 1440])
def test_a_position_off_the_batches_is_refused(position):
    with pytest.raises(ValueError, match=f"position {position} is no batch boundary"):
        pretraining_loader(open_image_source(), num_channels=1).batches(0, position)


def test_a_short_epoch_draws_other_images_each_time():
    loader = pretraining_loader(open_image_source(), num_channels=1, samples_per_epoch=100)
    assert loader.samples_used == 96
    batches = take(loader.batches(), 24)
    first, second = (set(torch.cat([b["index"] for b in part]).tolist()) for part in (batches[:12], batches[12:]))
    assert len(first) == len(second) == 96
    assert first != second


# Evaluation


@KINDS
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_gives_every_image_in_order_with_its_label(open_kind, kind, workers):
    source = open_kind(kind)
    transform = evaluation_transform(32)
    batches = list(evaluation_batches(source, transform=transform, num_channels=3, batch_size=10, num_workers=workers))
    assert [len(batch["labels"]) for batch in batches] == [10] * 8 + [4]
    labels = [row % 3 for size in SIZES for row in range(size)]
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == labels
    expected = torch.stack([transform(decode_image(image, 3)) for image in jpegs(84)])
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), expected)


def test_evaluation_takes_the_samples_asked_for():
    source = open_image_source()
    (batch,) = evaluation_batches(
        source, indices=[5, 2], transform=evaluation_transform(8, 1), num_channels=1, batch_size=8
    )
    assert batch["labels"].tolist() == source.labels()[[5, 2]].tolist()
    assert torch.equal(batch["pixel_values"][:, 0], torch.from_numpy(source.images[[5, 2]]))


def test_evaluation_leaves_bad_images_out_and_says_so(open_damaged, caplog):
    source = open_damaged("parquet")
    with caplog.at_level(logging.WARNING, logger="mimae.data.batches.loaders"):
        batches = list(evaluation_batches(source, transform=evaluation_transform(32), num_channels=3, batch_size=1))
    assert len(batches) == 84 - len(WRONG)
    assert "5 image(s) could not be decoded" in caplog.text
    assert source.describe(29) in caplog.text
