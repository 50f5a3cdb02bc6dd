"""A subset holds what was asked for, reads no more blocks than it needs, and keeps everybody's identity."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mimae.data.sources.opening import open_image_source
from mimae.data.sources.subsets import SubsetSource, low_shot_indices, read_subset_file
from mimae.tests.data_helpers import FEATURES, jpegs, pretraining_loader, shards, take, write_parquet, write_tars

ROWS = [1, 5, 21, 22, 40, 83]


@pytest.fixture
def open_kind(tmp_path, monkeypatch):
    """The same 84 images in three files of 30, 13 and 41: map-style, or streamed in blocks of at most 8."""
    monkeypatch.setattr("mimae.data.sources.sharded.SAMPLES_PER_TAR_BLOCK", 8)

    def open_source(kind):
        files = (write_tars if kind == "tar" else write_parquet)(tmp_path / kind, shards(30, 13, 41))
        return open_image_source(data_files=files, streaming=kind != "map", cache_dir=str(tmp_path / "cache"))

    return open_source


KINDS = pytest.mark.parametrize("kind", ["map", "parquet", "tar"])


@KINDS
def test_a_subset_gives_its_rows_by_their_own_names(open_kind, kind):
    source = open_kind(kind)
    subset = SubsetSource(source, ROWS)
    assert len(subset) == len(ROWS)
    assert [subset.read(row) for row in range(len(ROWS))] == [source.read(row) for row in ROWS]
    assert [subset.describe(row) for row in range(len(ROWS))] == [source.describe(row) for row in ROWS]
    assert subset.labels().tolist() == source.labels()[ROWS].tolist()
    assert subset.label_names == source.label_names
    assert [subset.next_in_file(row) for row in range(len(ROWS))] == [1, 2, 3, 4, 5, 0]


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_subset_of_shards_has_the_blocks_that_hold_its_rows(open_kind, kind):
    source = open_kind(kind)
    subset = pickle.loads(pickle.dumps(SubsetSource(source, ROWS)))
    # blocks of 8, 8, 8, 6 | 8, 5 | 8, 8, 8, 8, 8, 1 rows; 21 and 22 lie in one
    assert subset.reads_blocks
    assert subset.block_sizes.tolist() == [2, 2, 1, 1]
    assert subset.blocks.tolist() == [0, 2, 5, 11]
    assert subset.block_of(np.arange(6)).tolist() == [0, 0, 1, 1, 2, 3]
    assert subset.read_block(1, np.array([2, 3])) == [source.read(21), source.read(22)]


@KINDS
def test_a_loader_reads_of_a_subset_each_block_once_an_epoch(open_kind, kind):
    source = open_kind(kind)
    read_block, blocks = source.read_block, []
    source.read_block = lambda block, rows: blocks.append(block) or read_block(block, rows)
    batches = pretraining_loader(SubsetSource(source, ROWS), per_device_batch_size=2).batches()
    seen = np.concatenate([batch["index"].numpy() for batch in take(batches, 3)])
    assert sorted(seen.tolist()) == list(range(6))
    assert sorted(blocks) == ([] if kind == "map" else [0, 2, 5, 11])


def test_fingerprints_tell_subsets_apart():
    source = open_image_source()
    prints = {SubsetSource(source, rows).fingerprint for rows in ([1, 2], [1, 3], [1, 2, 3])}
    assert len(prints | {source.fingerprint}) == 4
    assert SubsetSource(source, [1, 2]).fingerprint in prints


@pytest.mark.parametrize(
    ("indices", "message"),
    [([], "needs indices in 0..1436"), ([0, 1437], "needs indices"), ([-1], "needs indices"), ([3, 3], "ascending")],
)
def test_indices_that_cannot_be_are_refused(indices, message):
    with pytest.raises(ValueError, match=message):
        SubsetSource(open_image_source(), indices)


# A fraction of every class


def test_a_low_shot_subset_takes_its_share_of_every_class_and_at_least_one():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [1000, 260, 40, 3]))
    indices = low_shot_indices(labels, 0.01, seed=0)
    assert np.bincount(labels[indices]).tolist() == [10, 3, 1, 1]
    assert np.all(np.diff(indices) > 0)
    assert low_shot_indices(labels, 1.0, seed=0).tolist() == list(range(len(labels)))


def test_a_low_shot_subset_is_the_same_everywhere_and_another_by_another_seed():
    labels = np.arange(100) % 4
    # drawn by numpy's Philox, whose raw words never change
    assert low_shot_indices(labels, 0.08, seed=7).tolist() == [10, 11, 15, 18, 20, 25, 40, 89]
    assert low_shot_indices(labels, 0.08, seed=8).tolist() == [4, 27, 32, 39, 41, 70, 73, 86]


def test_a_smaller_fraction_is_part_of_a_larger_one():
    labels = open_image_source().labels()
    small, large = (set(low_shot_indices(labels, fraction, seed=3).tolist()) for fraction in (0.01, 0.1))
    assert small < large


def test_classes_are_drawn_apart():
    """Equal numbers of rows do not make equal choices."""
    labels = np.repeat(np.arange(8), 50)
    choices = {tuple(row % 50 for row in chosen) for chosen in low_shot_indices(labels, 0.1, seed=0).reshape(8, 5)}
    assert len(choices) == 8


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, float("nan")])
def test_a_fraction_that_cannot_be_is_refused(fraction):
    with pytest.raises(ValueError, match="train_fraction must lie above 0 and not above 1"):
        low_shot_indices(np.arange(4), fraction, seed=0)


def test_fewer_images_than_classes_and_classes_without_images_are_refused():
    with pytest.raises(ValueError, match="2 images cannot hold one of each of 3 classes"):
        low_shot_indices(np.array([0, 1]), 0.5, seed=0, label_names=["cat", "dog", "emu"])
    with pytest.raises(ValueError, match=r"1 of 3 classes have no image in the training images .*'dog'"):
        low_shot_indices(np.array([0, 2, 2, 0]), 0.5, seed=0, label_names=["cat", "dog", "emu"])


# A list of files


@pytest.fixture
def folder(tmp_path):
    """Two classes of three images, named as in ImageNet."""
    for number, image in enumerate(jpegs(6)):
        wnid = ("n01440764", "n01443537")[number // 3]
        path = tmp_path / "folder" / wnid / f"{wnid}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return open_image_source(train_dir=str(tmp_path / "folder"), cache_dir=str(tmp_path / "cache"))


def write_list(tmp_path, *names):
    path = tmp_path / "list.txt"
    path.write_text("\n".join(names) + "\n\n")
    return path


def test_a_list_of_files_finds_its_images(folder, tmp_path):
    names = write_list(tmp_path, "n01443537_4.JPEG", "n01440764_2.JPEG", "n01443537_3.JPEG")
    assert read_subset_file(names, folder).tolist() == [2, 3, 4]


@pytest.mark.parametrize("streaming", [False, True])
def test_names_as_the_hub_has_them_are_found_by_the_original_ones(tmp_path, streaming):
    names = ["n01440764_10026_n01440764.JPEG", "n01443537_7_n01443537.JPEG", "n01443537_77_n01443537.JPEG"]
    cells = {"image": [{"bytes": b"", "path": name} for name in names], "label": [0, 1, 2]}
    pq.write_table(pa.table(cells, schema=FEATURES.arrow_schema), tmp_path / "a.parquet")
    source = open_image_source(
        data_files=str(tmp_path / "a.parquet"), streaming=streaming, cache_dir=str(tmp_path / "cache")
    )
    listed = write_list(tmp_path, "n01443537_77.JPEG", "n01440764_10026.JPEG", "n01443537_7.JPEG")
    assert read_subset_file(listed, source).tolist() == [0, 1, 2]


def test_keys_of_an_archive_are_found_without_extension(tmp_path):
    files = write_tars(tmp_path / "tars", shards(9))
    source = open_image_source(data_files=files, streaming=True, cache_dir=str(tmp_path / "cache"))
    assert read_subset_file(write_list(tmp_path, "00003.JPEG", "00001.JPEG", "00008.JPEG"), source).tolist() == [
        1,
        3,
        8,
    ]


def test_a_list_that_does_not_fit_is_refused_with_the_names(folder, tmp_path):
    for names, message in (
        (
            ["n01440764_1.JPEG", "a.JPEG", "b.JPEG"],
            r"2 of the 3 names in .*list.txt are not among the 6 images.*: a.JPEG, b",
        ),
        (["n01440764_1.JPEG"], r"1 of 2 classes have no image in the list .*'n01443537'"),
        ([], "is empty: it must hold one file name a line"),
    ):
        with pytest.raises(ValueError, match=message):
            read_subset_file(write_list(tmp_path, *names), folder)
    with pytest.raises(ValueError, match=r"nowhere\.txt is not a file"):
        read_subset_file("nowhere.txt", folder)
    with pytest.raises(ValueError, match=r"digits\[train\]:0 has no file name"):
        read_subset_file(write_list(tmp_path, "a"), open_image_source())


def test_a_name_that_several_images_have_is_refused(tmp_path):
    files = write_tars(tmp_path / "tars", shards(3, 3))
    source = open_image_source(data_files=files, streaming=True, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"1 of the 1 names in .* are the names of several of the 6 images"):
        read_subset_file(write_list(tmp_path, "00001.jpg"), source)
