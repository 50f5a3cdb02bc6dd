"""The data benchmark compares like with like, and its rehearsal runs."""

import io
import itertools
import time

import pytest
import torch
from PIL import Image

from mimae.benchmarks.data_pipeline import BARE, OFFICIAL, OURS, TRANSFORMERS, measure, pipelines_over
from mimae.benchmarks.data_steps import TrainingStep, loader_over, number_of_workers, run_steps, sources_over
from mimae.benchmarks.photographs import EncodedSource, jpegs
from mimae.data.images.transforms import IMAGENET_MEAN, IMAGENET_STD, Normalization

CPU = torch.device("cpu")


def test_the_photographs_are_different_real_sized_and_the_same_at_every_call():
    encoded = jpegs(12, 96)
    assert len(set(encoded)) == 12
    assert encoded == jpegs(12, 96)
    assert {Image.open(io.BytesIO(each)).size for each in encoded} == {(500, 375)}
    assert sum(map(len, jpegs(12, 90))) < sum(map(len, encoded))


def test_the_peers_do_the_same_work_and_ours_does_it_on_uint8():
    pipelines = pipelines_over(jpegs(4, 90), 32)
    torch.manual_seed(0)
    official = pipelines[OFFICIAL]()
    torch.manual_seed(0)
    assert torch.equal(pipelines[TRANSFORMERS](), official)
    torch.manual_seed(0)
    bare = Normalization(IMAGENET_MEAN, IMAGENET_STD, "cpu")(pipelines[BARE]())
    assert (bare - official).abs().mean() < 0.02  # one grey level
    ours = pipelines[OURS]()
    assert ours["pixel_values"].shape == official.shape == (4, 3, 32, 32)
    assert ours["noise"].shape == (4, 64)


def test_memory_folder_and_stream_give_the_same_images(tmp_path):
    encoded = jpegs(6, 90)
    for source in sources_over(encoded, tmp_path).values():
        assert [source.read(index)[0] for index in range(len(source))] == encoded


def slow(batch, seconds):
    while True:
        time.sleep(seconds)
        yield batch


def test_what_a_batch_takes_counts_as_waiting_and_what_its_step_takes_does_not():
    step = TrainingStep(32, CPU)
    batch = next(loader_over(EncodedSource(jpegs(2, 90)), 32, 2).batches())
    seconds, waited = run_steps(step, slow(batch, 0.05), 2)
    assert 0.1 <= waited < seconds
    assert run_steps(step, itertools.repeat(batch), 2)[1] < 0.1


@pytest.fixture(scope="module")
def rehearsal():
    threads = torch.get_num_threads()
    yield measure(CPU, quick=True)
    assert torch.get_num_threads() == threads


@pytest.mark.extended
def test_a_rehearsal_has_a_figure_for_every_pipeline_part_and_source(rehearsal):
    pipelines, parts, end_to_end = rehearsal.tables
    assert len(pipelines.rows) == 2
    assert [row[0] for row in end_to_end.rows] == ["memory", "a folder", "streamed parquet"]
    for table in rehearsal.tables:
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert all(figure >= 0 for row in table.rows for figure in row[1:])
    assert parts.rows[0][0] == "decode"
    assert number_of_workers(CPU) == 1


@pytest.mark.extended
def test_a_cpu_leaves_the_gpus_bar_open(rehearsal):
    official, waits, gpu = rehearsal.bars
    assert official.figure > 0
    assert 0 <= waits.figure <= 100
    assert gpu.figure is None
