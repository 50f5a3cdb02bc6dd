"""Servers that fail, really: what is read is right all the same, and where nothing can be read no run is lost."""

import io
import os
import socket
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
import pytest
from runs import metrics, pretrain, series, weights

from mimae.data.order import SampleOrder
from mimae.data.sources import remote
from mimae.data.sources.opening import open_image_source
from mimae.data.sources.remote import UnreadableFileError, open_shard
from mimae.drills.apparatus.comparing import compare
from mimae.drills.apparatus.recording import Impatience
from mimae.drills.apparatus.runs import Run
from mimae.drills.apparatus.serving import FailingHandler, serve_folder
from mimae.tests.data_helpers import shards, write_parquet, write_tars
from mimae.training.checkpoints.store import verify
from mimae.training.trainer import BatchError

TRIES = 3
SIZES = (40, 1, 40, 40)  # rows of the shards; a shard of one row is read in one micro-step of one process
LONELY_ROW, LONELY_FILE = 40, "shard-1.parquet"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Seconds instead of minutes."""
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", TRIES)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0.01)
    monkeypatch.setattr(remote, "READ_TIMEOUT", 0.5)


class ObedientHandler(FailingHandler):
    """Fails as `faults` (of requests for a range) and `opening_faults` (of others) say, then serves."""

    faults: ClassVar[list[str]] = []
    opening_faults: ClassVar[list[str]] = []
    served: ClassVar[dict[str, int]] = {}  # ranges of a file that are served before it fails for good
    out_after: ClassVar[dict[str, Path]] = {}  # a file is not served any more once that path exists
    requests: ClassVar[list[tuple[str, str]]] = []

    def next_fault(self):
        name, is_range = Path(self.path).name, "Range" in self.headers
        self.requests.append((self.command, name))
        faults = self.faults if is_range else self.opening_faults
        fault = faults.pop(0) if faults else "none"
        if is_range and name in self.served:
            self.served[name] -= 1
            fault = "503" if self.served[name] < 0 else fault
        is_out = name in self.out_after and self.out_after[name].exists()
        return "503" if is_out else fault


@pytest.fixture
def server(tmp_path):
    """(handler class, URL, folder that is served)"""

    class Handler(ObedientHandler):
        faults, opening_faults, served, out_after, requests = [], [], {}, {}, []

    (tmp_path / "served").mkdir()
    with serve_folder(tmp_path / "served", Handler) as url:
        yield Handler, url, tmp_path / "served"


FAULTS = ["cut", "reset", "reset_in_the_body", "silence", "stall_in_the_body", "whole", "page", "other_range"]


@pytest.mark.parametrize("fault", [*FAULTS, "429", "500", "503"])
def test_a_failed_read_is_tried_again_and_gives_the_right_bytes(server, fault):
    handler, url, folder = server
    content = np.random.default_rng(0).bytes(100_000)
    (folder / "a.tar").write_bytes(content)
    with open_shard(f"{url}/a.tar") as file:
        handler.faults[:] = ["none", fault]
        file.seek(70_000)
        assert file.read(10) == content[70_000:70_010]
        file.seek(10)
        assert file.read(60_000) == content[10:60_010]
        assert handler.faults == []
        assert file.seek(0, io.SEEK_END) == 100_000
        assert file.read(1) == b""
    assert handler.requests.count(("GET", "a.tar")) == 3


@pytest.mark.parametrize("fault", ["reset", "silence", "429", "500", "503"])
def test_a_failed_opening_is_tried_again(server, fault):
    handler, url, folder = server
    (folder / "a.tar").write_bytes(b"content")
    handler.opening_faults[:] = [fault, fault]  # of HEAD, and of the GET that then asks for the size
    with open_shard(f"{url}/a.tar") as file:
        assert file.read() == b"content"
    assert handler.opening_faults == []


@pytest.mark.parametrize("status", ["401", "403", "404", "410"])
def test_a_file_that_is_not_there_or_not_allowed_is_an_error_at_once(server, status):
    handler, url, folder = server
    (folder / "a.tar").write_bytes(b"content")
    handler.opening_faults[:] = [status] * 100
    with pytest.raises(UnreadableFileError, match=rf"{url}/a\.tar is not there or not allowed .*{status}"):
        open_shard(f"{url}/a.tar")
    assert handler.requests == [("HEAD", "a.tar"), ("GET", "a.tar")]


@pytest.mark.parametrize("fault", [*FAULTS, "429", "503"])
def test_an_outage_ends_after_so_many_tries_in_an_error_that_names_the_file(server, fault):
    handler, url, folder = server
    (folder / "a.tar").write_bytes(bytes(100_000))
    with open_shard(f"{url}/a.tar") as file:
        file.seek(50_000)
        handler.faults[:] = [fault] * 100
        with pytest.raises(UnreadableFileError, match=rf"{url}/a\.tar could not be read in {TRIES} tries"):
            file.read()
        requests = 100 - len(handler.faults)
        assert requests == TRIES * (2 if fault == "reset" else 1)  # aiohttp itself repeats a request that is reset
        handler.faults.clear()
        assert file.read() == bytes(50_000)  # and where the server is back, so is the file


def test_a_server_that_is_gone_is_named():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(UnreadableFileError, match=rf"127\.0\.0\.1:{port}/a\.tar could not be read"):
        open_shard(f"http://127.0.0.1:{port}/a.tar")


@pytest.mark.parametrize("write", [write_parquet, write_tars])
def test_sources_on_a_failing_server_are_those_on_disk(server, write, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK_BYTES", 2000)
    handler, url, folder = server
    names = [Path(path).name for path in write(folder, shards(12, 9))]
    options = {"streaming": True, "cache_dir": str(tmp_path / "cache")}
    local = open_image_source(data_files=[str(folder / name) for name in names], **options)
    handler.faults[:] = ["cut", "none", "503", "none", "none", "reset_in_the_body", "none"] * 50
    distant = open_image_source(data_files=[f"{url}/{name}" for name in names], **options)
    assert [distant.read(index) for index in range(21)] == [local.read(index) for index in range(21)]

    handler.faults[:] = ["503"] * 100
    with pytest.raises(UnreadableFileError, match=names[0]):
        distant.read(0)
    handler.faults.clear()
    assert distant.read(0) == local.read(0)


def test_a_damaged_row_group_names_its_file(tmp_path):
    (path,) = write_parquet(tmp_path, shards(20), row_group_size=20)
    source = open_image_source(data_files=path, streaming=True, cache_dir=str(tmp_path / "cache"))
    content = bytearray(Path(path).read_bytes())
    content[4:2000] = bytes(1996)
    Path(path).write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-0\.parquet is no parquet file or a damaged one"):
        source.read(3)


def test_an_archive_cut_after_it_was_listed_gives_no_short_image(tmp_path):
    (path,) = write_tars(tmp_path, shards(20))
    source = open_image_source(data_files=path, streaming=True, cache_dir=str(tmp_path / "cache"))
    os.truncate(path, int(source.offsets[19]) + 5)
    assert source.read(18)
    with pytest.raises(ValueError, match=r"shard-0\.tar:19 is cut short"):
        source.read(19)


# Whole runs


def settings(url, tmp_path, **more):
    """A run on four shards at `url`, 30 images a step, 4 steps an epoch."""
    files = [f"{url}/shard-{number}.parquet" for number in range(len(SIZES))]
    common = {"data_files": files, "streaming": True, "cache_dir": tmp_path / "cache", "shuffle_window": 50}
    return (
        common | {"probe_samples": 0, "max_train_steps": 10, "checkpointing_steps": 100, "drop_path_rate": 0.1} | more
    )


def position_of_the_lonely_row(seed):
    """In the first epoch."""
    block_sizes = [8] * 5 + [1] + [8] * 10
    return SampleOrder(block_sizes, seed, 50).slice(0, 0, sum(SIZES)).tolist().index(LONELY_ROW)


def fail_at_the_lonely_row(handler):
    """From now on: after the one request with which the shard is listed."""
    handler.served[LONELY_FILE] = 1


def assert_same_run(one, other):
    for name, tensor in weights(one).items():
        assert tensor.equal(weights(other)[name]), name
    for name in ("loss", "mi_max_loss", "grad_norm"):
        assert series(one, name) == series(other, name)
        assert len(series(one, name)) == 10


@pytest.mark.parametrize(
    ("seed", "batch_size", "accumulation", "num_workers"),
    [(0, 30, 1, 0), pytest.param(0, 30, 1, 2, marks=pytest.mark.extended), (0, 10, 3, 0)],
)
def test_a_run_that_cannot_read_saves_its_last_step_and_resumed_equals_one_without_failure(
    server, tmp_path, seed, batch_size, accumulation, num_workers
):
    handler, url, folder = server
    write_parquet(folder, shards(*SIZES))
    more = {"seed": seed, "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    more["mi_gate_threshold"] = 1.38
    run = settings(url, tmp_path, dataloader_num_workers=num_workers, **more)
    last_step, rest = divmod(position_of_the_lonely_row(seed), 30)
    assert last_step > 0
    assert rest // batch_size == accumulation - 1  # the last micro-step is the one that fails

    fail_at_the_lonely_row(handler)
    message = rf"process 0 has no batch for step {last_step + 1}: .*{LONELY_FILE} could .* after step {last_step}$"
    with pytest.raises(BatchError, match=message) as caught:
        pretrain(tmp_path / "parts", **run)
    assert isinstance(caught.value.__cause__, UnreadableFileError)
    (checkpoint,) = (tmp_path / "parts").glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{last_step}"
    assert verify(checkpoint) == []

    handler.served.clear()
    assert pretrain(tmp_path / "parts", "--resume_from_checkpoint", "latest", **run) == 0
    assert pretrain(tmp_path / "whole", **run) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    active = series(tmp_path / "whole", "mi_active")[last_step + 1]
    assert (0 < active < 1) == (accumulation > 1)  # then the gate opened in the very step that failed


def test_a_run_that_cannot_read_its_first_batch_saves_nothing(server, tmp_path):
    handler, url, folder = server
    write_parquet(folder, shards(*SIZES))
    fail_at_the_lonely_row(handler)
    with pytest.raises(BatchError, match=r"no batch for step 1: [^;]*$"):
        pretrain(tmp_path / "run", **settings(url, tmp_path, per_device_train_batch_size=120))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.extended
@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_evaluation_that_cannot_read_loses_no_step_and_is_made_up_for(server, tmp_path, forked_runs, num_processes):
    handler, url, folder = server
    write_parquet(folder, shards(*SIZES))
    evaluated = {"validation_files": f"{url}/shard-0.parquet", "evaluation_steps": 4, "probe_samples": 40}
    common = settings(url, tmp_path, num_channels=3, dataloader_num_workers=1)
    files = {"data_files": common["data_files"][1:], "per_device_train_batch_size": 30 // num_processes}
    impatience = Impatience(between_tries=0.01, for_an_answer=0.5)

    parts = Run(tmp_path / "parts", {**common, **evaluated, **files}, num_processes)
    handler.out_after["shard-0.parquet"] = parts.output_dir / "checkpoint-4"
    parts.start(impatience=impatience)
    assert parts.wait() == [1] * num_processes
    assert "shard-0.parquet could not be read in 20 tries" in parts.log()
    assert [path.name for path in parts.valid_checkpoints()] == ["checkpoint-4"]

    handler.out_after.clear()
    whole = Run(tmp_path / "whole", parts.flags, num_processes).finish(impatience=impatience)
    assert compare(parts.finish(impatience=impatience), whole).equal
    assert parts.record.most_redone() == 0
    assert parts.series("knn_accuracy").keys() == {0, 4, 8, 10}


def test_images_that_do_not_fill_a_step_are_counted_in_the_log(tmp_path, capsys):
    (path,) = write_parquet(tmp_path, shards(25))
    run = {"data_files": path, "streaming": True, "cache_dir": tmp_path / "cache", "max_train_steps": 1}
    pretrain(tmp_path / "fives", per_device_train_batch_size=5, **run)
    assert "left out" not in capsys.readouterr().err
    pretrain(tmp_path / "tens", per_device_train_batch_size=10, **run)
    assert capsys.readouterr().err.count(" 5 images of each epoch, others in each, are left out") == 1


def test_where_one_of_two_processes_cannot_read_both_end_and_resumed_equal_two_without_failure(
    server, tmp_path, forked_runs
):
    handler, url, folder = server
    write_parquet(folder, shards(*SIZES))
    settings_of_two = settings(url, tmp_path, per_device_train_batch_size=15, num_channels=3)
    impatience = Impatience(between_tries=0.01, for_an_answer=0.5)
    last_step = position_of_the_lonely_row(seed=0) // 30

    fail_at_the_lonely_row(handler)
    parts = Run(tmp_path / "parts", settings_of_two, num_processes=2)
    parts.start(impatience=impatience)
    assert parts.wait() == [1, 1]
    rank = position_of_the_lonely_row(seed=0) % 30 // 15
    assert parts.log().count(f"BatchError: process {rank} has no batch for step {last_step + 1}: ") == 1, parts.log()
    assert parts.log().count(f"BatchError: process {rank} has no batch for step {last_step + 1}; ") == 1, parts.log()
    assert f"{LONELY_FILE} could not be read in 20 tries" in parts.log()
    assert max(line["step"] for line in metrics(parts.output_dir)) == last_step

    handler.served.clear()
    whole = Run(tmp_path / "whole", settings_of_two, num_processes=2)
    assert compare(parts.finish(impatience=impatience), whole.finish(impatience=impatience)).equal
    assert "world size 2" in parts.log()
