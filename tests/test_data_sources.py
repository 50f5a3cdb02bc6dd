"""Every way into the data gives the same images and labels; what is wrong is named, with what would be right."""

import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session, hf_raise_for_status
from PIL import Image

from mimae.data.sources import sharded
from mimae.data.sources.hugging_face import explained_access
from mimae.data.sources.opening import open_image_source
from mimae.drills.apparatus.serving import RangeHandler, serve, serve_folder
from mimae.tests.data_helpers import FEATURES, jpegs, shards, write_idx, write_idx_folder, write_parquet, write_tars


def rows(source):
    return [source.read(index) for index in range(len(source))]


def expected_rows(*sizes):
    return [(image, row % 3) for images in shards(*sizes) for row, image in enumerate(images)]


@pytest.fixture
def image_folder(tmp_path):
    """Six photographs in two class folders, numbered against the alphabet of their classes."""
    for number, image in enumerate(jpegs(6)):
        path = tmp_path / "folder" / ("zebra", "ant")[number // 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return str(tmp_path / "folder")


# The embedded digits and IDX folders


def test_the_default_is_the_digits_cut_in_proportion():
    train, test = open_image_source(), open_image_source(dataset_name="digits", split="test")
    assert (len(train), len(test)) == (1437, 360)
    images = [source.images.reshape(len(source), -1) for source in (train, test)]
    assert images[0].dtype == np.uint8
    assert (images[0].min(), images[0].max()) == (0, 255)
    for source in (train, test):
        counts = np.bincount(source.labels(), minlength=10) / len(source)
        assert np.abs(counts - 0.1).max() < 0.01
    assert train.label_names == [str(digit) for digit in range(10)]
    assert train.read(0)[0].shape == (8, 8)
    assert train.fingerprint != test.fingerprint
    assert train.fingerprint == open_image_source().fingerprint


@pytest.mark.parametrize("compress", [False, True])
def test_an_idx_folder_gives_its_arrays(tmp_path, compress):
    images, labels = write_idx_folder(tmp_path, compress)
    write_idx_folder(tmp_path, compress, split="t10k", count=2)
    source = open_image_source(train_dir=str(tmp_path))
    assert [source.read(row)[1] for row in range(5)] == labels.tolist()
    assert np.array_equal(np.stack([source.read(row)[0] for row in range(5)]), images)
    assert len(open_image_source(train_dir=str(tmp_path), split="test")) == 2
    assert source.describe(4).endswith("train-images-idx3-ubyte:4")
    assert source.next_in_file(4) == 0


def damage_magic(folder):
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(b"\1" + path.read_bytes()[1:])


def damage_length(folder):
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])


def damage_count(folder):
    write_idx(folder / "train-labels-idx1-ubyte", np.zeros(4, np.uint8), compress=False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_magic, "not an IDX file"),
        (damage_length, "announces 60 bytes"),
        (damage_count, "5 images but 4 labels"),
        (lambda folder: (folder / "train-labels-idx1-ubyte").unlink(), "lacks train-labels"),
    ],
)
def test_a_damaged_idx_folder_is_refused_by_name(tmp_path, damage, message):
    write_idx_folder(tmp_path, compress=False)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_image_source(train_dir=str(tmp_path))


# The same photographs through every door


def test_a_folder_of_images_is_sorted_and_labelled_by_its_classes(image_folder, tmp_path):
    source = open_image_source(train_dir=image_folder, cache_dir=str(tmp_path / "cache"))
    assert source.label_names == ["ant", "zebra"]
    assert rows(source) == [(image, 0) for image in jpegs(6)[3:]] + [(image, 1) for image in jpegs(6)[:3]]
    assert "ant/3.jpg" in source.describe(0)


def test_a_folder_without_classes_has_no_labels(tmp_path):
    for number, image in enumerate(jpegs(3)):
        (tmp_path / f"{number}.jpg").write_bytes(image)
    source = open_image_source(train_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert not source.has_labels
    assert rows(source) == [(image, None) for image in jpegs(3)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", [write_parquet, write_tars])
def test_shards_give_the_same_rows_streamed_or_converted(tmp_path, write, streaming):
    write(tmp_path / "data", shards(20, 7))
    pattern = str(tmp_path / "data" / "shard-*")
    source = open_image_source(data_files=pattern, streaming=streaming, cache_dir=str(tmp_path / "cache"))
    assert rows(source) == expected_rows(20, 7)
    assert source.has_labels


@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_data_set_with_its_own_splits(tmp_path, streaming):
    for split, sizes in (("train", (9, 4)), ("validation", (5,))):
        for path in write_parquet(tmp_path / split, shards(*sizes)):
            (tmp_path / "data").mkdir(exist_ok=True)
            Path(path).rename(tmp_path / "data" / f"{split}-{Path(path).name}")
    options = {"dataset_name": str(tmp_path / "data"), "streaming": streaming, "cache_dir": str(tmp_path / "cache")}
    assert rows(open_image_source(**options)) == expected_rows(9, 4)
    source = open_image_source(split="validation", **options)
    assert rows(source) == expected_rows(5)
    assert source.label_names == ["cat", "coffee", "astronaut"]
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train', 'validation'\]"):
        open_image_source(split="test", **options)


def test_shards_number_their_rows_by_file_and_wrap_within_it(tmp_path):
    paths = write_parquet(tmp_path, shards(20, 7), row_group_size=8)
    source = open_image_source(data_files=paths, streaming=True, cache_dir=str(tmp_path / "cache"))
    assert source.block_sizes.tolist() == [8, 8, 4, 7]
    assert source.block_of(np.array([0, 7, 8, 19, 20, 26])).tolist() == [0, 0, 1, 2, 3, 3]
    assert source.describe(20) == f"{paths[1]}:0"
    assert [source.next_in_file(index) for index in (0, 7, 19, 26)] == [1, 8, 0, 20]


def test_tar_samples_are_grouped_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(sharded, "SAMPLES_PER_TAR_BLOCK", 4)
    paths = write_tars(tmp_path, shards(10, 3))
    source = open_image_source(data_files=paths, streaming=True, cache_dir=str(tmp_path / "cache"))
    assert source.block_sizes.tolist() == [4, 4, 2, 3]


def test_a_tar_sample_without_image_is_an_empty_one_and_odd_members_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        members = [("x/1.jpg", b"one"), ("x/1.cls", b"4"), ("../2.cls", b"5"), ("__meta.cls", b"6"), (".hidden", b"")]
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    source = open_image_source(data_files=str(tmp_path / "a.tar"), streaming=True, cache_dir=str(tmp_path / "cache"))
    assert rows(source) == [(b"one", 4), (b"", 5)]


def test_sources_travel_to_spawned_workers(tmp_path):
    paths = write_parquet(tmp_path, shards(9)), write_tars(tmp_path, shards(9))
    for files in paths:
        source = open_image_source(data_files=files, streaming=True, cache_dir=str(tmp_path / "cache"))
        source.read(0)  # opens a file, which cannot travel
        assert rows(pickle.loads(pickle.dumps(source))) == rows(source)


def test_a_listing_is_gathered_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    listed = []
    list_row_groups = sharded._list_row_groups
    monkeypatch.setattr(sharded, "_list_row_groups", lambda path: listed.append(path) or list_row_groups(path))
    options = {"streaming": True, "cache_dir": str(tmp_path / "cache")}
    (path,) = write_parquet(tmp_path, shards(9))
    first = open_image_source(data_files=path, **options)
    again = open_image_source(data_files=path, **options)
    assert listed == [path]
    assert again.fingerprint == first.fingerprint
    write_parquet(tmp_path, shards(12))
    os.utime(path, (1, 1))
    changed = open_image_source(data_files=path, **options)
    assert len(changed) == 12
    assert changed.fingerprint != first.fingerprint


def test_a_fingerprint_belongs_to_the_data_and_not_to_the_place(tmp_path, image_folder):
    prints = []
    for place in ("here", "there"):
        path = write_parquet(tmp_path / place, shards(9))
        prints.append(open_image_source(data_files=path, streaming=True, cache_dir=str(tmp_path / "c")).fingerprint)
    assert prints[0] == prints[1]
    cache = str(tmp_path / "cache")
    before = open_image_source(train_dir=image_folder, cache_dir=cache).fingerprint
    moved = Path(image_folder).rename(tmp_path / "moved")
    assert open_image_source(train_dir=str(moved), cache_dir=cache).fingerprint == before
    (moved / "ant" / "4.jpg").unlink()
    assert open_image_source(train_dir=str(moved), cache_dir=cache).fingerprint != before


def test_parquet_over_http(tmp_path):
    write_parquet(tmp_path, shards(20, 7))
    with serve_folder(tmp_path) as url:
        files = [f"{url}/shard-0.parquet", f"{url}/shard-1.parquet"]
        source = open_image_source(data_files=files, streaming=True, cache_dir=str(tmp_path / "cache"))
        assert rows(source) == expected_rows(20, 7)


def test_tar_over_http(tmp_path):
    write_tars(tmp_path, shards(20))
    with serve_folder(tmp_path) as url:
        source = open_image_source(data_files=f"{url}/shard-0.tar", streaming=True, cache_dir=str(tmp_path / "cache"))
        assert rows(source) == expected_rows(20)


class NamelessHandler(RangeHandler):
    identifies_files = False


def test_a_listing_is_not_kept_of_files_that_could_change_unseen(tmp_path):
    with serve_folder(tmp_path / "data", NamelessHandler) as url:
        for size in (9, 12):
            write_parquet(tmp_path / "data", shards(size))
            source = open_image_source(
                data_files=f"{url}/shard-0.parquet", streaming=True, cache_dir=str(tmp_path / "cache")
            )
            assert len(source) == size


# Labels and file names, without the images


def blank_images(path):
    """Overwrites what a shard stores of its images, so that nobody can have read them."""
    content = bytearray(Path(path).read_bytes())
    if path.endswith(".tar"):
        with tarfile.open(path) as archive:
            ranges = [(m.offset_data, m.size) for m in archive if m.name.endswith(".jpg")]
    else:
        footer = pq.ParquetFile(path).metadata
        columns = [footer.row_group(group).column(0) for group in range(footer.num_row_groups)]
        assert all(column.path_in_schema == "image.bytes" for column in columns)
        ranges = [(c.dictionary_page_offset or c.data_page_offset, c.total_compressed_size) for c in columns]
    for start, length in ranges:
        content[start : start + length] = bytes(length)
    Path(path).write_bytes(content)


@pytest.mark.parametrize("write", [write_parquet, write_tars])
def test_labels_of_a_stream_are_read_without_its_images(tmp_path, write):
    paths = write(tmp_path, shards(20, 7))
    for path in paths:
        blank_images(path)
    source = open_image_source(data_files=paths, streaming=True, cache_dir=str(tmp_path / "cache"))
    labels = source.labels()
    assert labels.dtype == np.int64
    assert labels.tolist() == [label for _, label in expected_rows(20, 7)]


def test_labels_in_memory_and_of_a_folder(image_folder, tmp_path):
    digits = open_image_source()
    assert digits.labels().tolist() == [digits.read(row)[1] for row in range(len(digits))]
    assert digits.labels().dtype == np.int64
    _, labels = write_idx_folder(tmp_path / "idx", compress=False)
    assert open_image_source(train_dir=str(tmp_path / "idx")).labels().tolist() == labels.tolist()
    folder = open_image_source(train_dir=image_folder, cache_dir=str(tmp_path / "cache"))
    assert folder.labels().tolist() == [0, 0, 0, 1, 1, 1]


def test_labels_that_are_not_there_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(jpegs(1)[0])
    source = open_image_source(train_dir=str(tmp_path / "photos"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"photos\[train\] has no labels: .*--label_column_name"):
        source.labels()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("labels", [[2, -1, -1], [2, None, None]])
def test_an_unlabelled_split_says_so(tmp_path, streaming, labels):
    path = write_columns(tmp_path / "a.parquet", image=jpegs(3), label=pa.array(labels, pa.int64()))
    source = open_image_source(data_files=path, streaming=streaming, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"2 of the 3 images .*:1: .*unlabelled test split"):
        source.labels()


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_know_their_file_names(tmp_path, streaming):
    names = ["n01440764_10026_n01440764.JPEG", "x.jpg", "y.jpg"]
    cells = [{"bytes": image, "path": name} for image, name in zip(jpegs(3), names, strict=True)]
    path = write_columns(tmp_path / "a.parquet", image=cells, label=[0, 1, 2])
    options = {"streaming": streaming, "cache_dir": str(tmp_path / "cache")}
    assert open_image_source(data_files=path, **options).file_names() == names
    nameless = write_columns(tmp_path / "b.parquet", image=jpegs(3), label=[0, 1, 2])
    for files in (nameless, write_parquet(tmp_path / "c", shards(3))):
        with pytest.raises(ValueError, match=r":0 has no file name.*--train_fraction"):
            open_image_source(data_files=files, **options).file_names()


def test_a_folder_and_an_archive_know_their_file_names(image_folder, tmp_path):
    source = open_image_source(train_dir=image_folder, cache_dir=str(tmp_path / "cache"))
    assert [Path(name).name for name in source.file_names()] == ["3.jpg", "4.jpg", "5.jpg", "0.jpg", "1.jpg", "2.jpg"]
    paths = write_tars(tmp_path / "tars", shards(3, 2))
    source = open_image_source(data_files=paths, streaming=True, cache_dir=str(tmp_path / "cache"))
    assert source.file_names() == ["00000", "00001", "00002", "00000", "00001"]


# Columns


def write_columns(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_columns_are_found_by_name(tmp_path, streaming):
    images = jpegs(2)
    path = write_columns(tmp_path / "a.parquet", photo=images, kind=[5, 6], caption=["a", "b"])
    options = {"data_files": path, "streaming": streaming, "cache_dir": str(tmp_path / "cache")}
    source = open_image_source(image_column_name="photo", label_column_name="kind", **options)
    assert rows(source) == [(images[0], 5), (images[1], 6)]
    assert not open_image_source(image_column_name="photo", **options).has_labels
    with pytest.raises(ValueError, match=r"columns are \['photo', 'kind', 'caption'\]: set --image_column_name"):
        open_image_source(**options)
    with pytest.raises(ValueError, match=r"no image column 'pic'; its columns are \['photo'"):
        open_image_source(image_column_name="pic", **options)
    with pytest.raises(ValueError, match=r"no label column 'class'; its columns are \['photo'"):
        open_image_source(image_column_name="photo", label_column_name="class", **options)
    with pytest.raises(ValueError, match="labels must be integers"):
        open_image_source(image_column_name="photo", label_column_name="caption", **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_cell_is_an_empty_image(tmp_path, streaming):
    cells = [{"bytes": jpegs(1)[0], "path": None}, {"bytes": None, "path": None}, None]
    path = write_columns(tmp_path / "a.parquet", image=cells)
    source = open_image_source(data_files=path, streaming=streaming, cache_dir=str(tmp_path / "cache"))
    assert [source.read(row)[0] for row in range(3)] == [jpegs(1)[0], b"", b""]


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": "digits", "split": "validation"}, r"it has \['train', 'test'\]"),
        ({"dataset_name": "digits", "train_dir": "x"}, "--dataset_name and --train_dir"),
        ({"dataset_name": "digits", "data_files": "x.tar"}, "--dataset_name and --data_files"),
        ({"train_dir": "no/such/folder"}, "no/such/folder is not a folder"),
        ({"data_files": "no/such/*.parquet"}, "no file matches no/such/"),
        ({"data_files": "http://localhost/a.zip"}, r"takes .parquet or .tar files.*'.zip'"),
        ({"data_files": ["http://localhost/a.tar", "http://localhost/a.parquet"]}, "all of one kind"),
    ],
)
def test_a_place_that_cannot_be_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        open_image_source(**options)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_set_is_refused(tmp_path, streaming):
    with pq.ParquetWriter(tmp_path / "a.parquet", FEATURES.arrow_schema):
        pass
    with pytest.raises(ValueError, match=r"split 'train' of --data_files is empty|hold no image.*a\.parquet"):
        open_image_source(
            data_files=str(tmp_path / "a.parquet"), streaming=streaming, cache_dir=str(tmp_path / "cache")
        )


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_shard_is_refused_by_name(tmp_path, streaming):
    good, bad = write_parquet(tmp_path, shards(4, 4))
    Path(bad).write_bytes(Path(bad).read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"shard-1\.parquet|cannot be converted"):
        open_image_source(data_files=[good, bad], streaming=streaming, cache_dir=str(tmp_path / "cache"))


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").write_text("none")
    with pytest.raises(ValueError, match="data"):
        open_image_source(train_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))


def test_a_stream_that_cannot_be_read_at_random_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps({"image": "a.jpg"}))
    with pytest.raises(ValueError, match=r"'.jsonl'.*drop --streaming"):
        open_image_source(dataset_name=str(tmp_path / "data"), streaming=True, cache_dir=str(tmp_path / "cache"))


def test_a_compressed_tar_is_refused_as_a_stream(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("1.jpg"))
    with pytest.raises(ValueError, match=r"uncompressed tar.*without --streaming"):
        open_image_source(data_files=str(tmp_path / "a.tar"), streaming=True, cache_dir=str(tmp_path / "cache"))


# The Hub


class RefusingHub(http.server.BaseHTTPRequestHandler):
    """Answers every request for a data set as the Hub would: gated without login, gated without consent, missing."""

    def do_GET(self):
        status, code = 404, "RepoNotFound"
        if "gated" in self.path:
            status, code = 401 if "login" in self.path else 403, "GatedRepo"
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET  # noqa: N815

    def log_message(self, *args):
        pass


class StatusHandler(http.server.BaseHTTPRequestHandler):
    """Answers /403 with 403."""

    def do_GET(self):
        self.send_response(int(self.path[1:]))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


def read_refused_shard(url):
    with explained_access("some/set"):
        try:
            hf_raise_for_status(get_session().get(url))
        except HfHubHTTPError as error:
            raise OSError("cannot read shard 3") from error


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_explained_however_deep_it_lies(status):
    """A gated data set can be listed by everyone; only the reading of its files is refused."""
    with serve(StatusHandler) as url, pytest.raises(ValueError, match=r"/datasets/some/set .*`hf auth login`"):
        read_refused_shard(f"{url}/{status}")


def test_a_failing_hub_is_not_called_a_refusal():
    with serve(StatusHandler) as url, pytest.raises(OSError, match="cannot read shard 3"):
        read_refused_shard(f"{url}/500")


ASK_HUB = """
from mimae.data.sources.opening import open_image_source
for name in ("some/missing", "some/gated-login", "some/gated-consent"):
    for streaming in (False, True):
        try:
            open_image_source(dataset_name=name, streaming=streaming)
        except ValueError as error:
            print(error, end="\\n--\\n")
"""


def test_a_gated_or_missing_hub_set_names_its_page_and_the_login(tmp_path):
    with serve(RefusingHub) as url:
        environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        result = subprocess.run(
            [sys.executable, "-c", ASK_HUB], env=environment, capture_output=True, text=True, timeout=120
        )
    messages = result.stdout.split("\n--\n")[:-1]
    assert len(messages) == 6, result.stderr
    names = [name for name in ("missing", "gated-login", "gated-consent") for _ in range(2)]
    for name, message in zip(names, messages, strict=True):
        assert f"{url}/datasets/some/{name} " in message
        assert "`hf auth login`" in message


def write_images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((8, 8), 64).save(folder / name)


def test_names_of_files_choose_no_split(tmp_path):
    # 🤗 Datasets takes ImageNet's own names for a validation split, and "train" in one name for the whole of it
    names = ["ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG", "0.1_train _ bus.jpg", "plain.png"]
    write_images(tmp_path / "images", *(f"{label}/{name}" for label in ("cat", "dog") for name in names))
    source = open_image_source(train_dir=str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))
    assert len(source) == 8
    assert source.label_names == ["cat", "dog"]
    assert source.labels().tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("classes", [("cat/", "dog/"), ("",)])
def test_folders_named_as_splits_are_splits(tmp_path, classes):
    for split, count in (("train", 3), ("val", 2)):
        write_images(tmp_path / "x" / split, *(f"{label}{i}.png" for label in classes for i in range(count)))
    cache = str(tmp_path / "cache")
    for split, count in (("train", 3), ("validation", 2)):
        source = open_image_source(train_dir=str(tmp_path / "x"), split=split, cache_dir=cache)
        assert len(source) == count * len(classes)


def test_a_class_may_be_called_train(tmp_path):
    write_images(tmp_path / "x", "bus/1.png", "train/1.png", "train/2.png")
    source = open_image_source(train_dir=str(tmp_path / "x"), cache_dir=str(tmp_path / "cache"))
    assert source.label_names == ["bus", "train"]
    assert source.labels().tolist() == [0, 1, 1]
