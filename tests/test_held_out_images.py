"""Which images are held out: what is there is found, what is damaged is said, and the flag at fault is named."""

import shutil
from pathlib import Path

import pytest

from mimae.data.sources.opening import image_splits
from mimae.evaluation.robustness import imagenet_wnids
from mimae.flags.data import DataArguments
from mimae.jobs.robustness import imagenet_tests
from mimae.tests.data_helpers import jpegs, write_idx_folder, write_parquet


def data_set(folder: Path, *splits: str) -> Path:
    """A local data set as the Hub has them: data/SPLIT-00000-of-00001.parquet."""
    (folder / "data").mkdir(parents=True)
    for split in splits:
        (path,) = write_parquet(folder / split, [jpegs(6)])
        shutil.move(path, folder / "data" / f"{split}-00000-of-00001.parquet")
        (folder / split).rmdir()
    return folder


def arguments(tmp_path: Path, **values) -> DataArguments:
    return DataArguments(cache_dir=str(tmp_path / "cache"), **values)


@pytest.mark.parametrize(
    ("splits", "held_out"), [(("train", "validation", "test"), "validation"), (("train", "test"), "test")]
)
def test_the_usual_split_that_is_there_is_held_out(tmp_path, splits, held_out):
    folder = data_set(tmp_path / "set", *splits)
    assert arguments(tmp_path, dataset_name=str(folder)).open_held_out().name == f"{folder}[{held_out}]"


def test_the_split_that_is_trained_on_is_not_held_out(tmp_path):
    folder = data_set(tmp_path / "set", "validation", "test")
    source = arguments(tmp_path, dataset_name=str(folder), train_split="validation").open_held_out()
    assert source.name == f"{folder}[test]"


def test_where_there_is_no_other_split_nothing_is_held_out(tmp_path):
    assert arguments(tmp_path, dataset_name=str(data_set(tmp_path / "set", "train"))).open_held_out() is None


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_validation_shard_is_an_error_and_no_missing_split(tmp_path, streaming):
    folder = data_set(tmp_path / "set", "train", "validation")
    shard = folder / "data" / "validation-00000-of-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(Exception, match=r"(?i)parquet|validation"):
        arguments(tmp_path, dataset_name=str(folder), streaming=streaming).open_held_out()


def test_damaged_idx_files_of_the_test_split_are_an_error(tmp_path):
    write_idx_folder(tmp_path, compress=False)
    write_idx_folder(tmp_path, compress=False, split="t10k", count=2)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"t10k-images.*announces"):
        arguments(tmp_path, train_dir=str(tmp_path)).open_held_out()


def test_splits_are_told_without_opening_one(tmp_path):
    folder = data_set(tmp_path / "set", "train", "validation")
    for path in (folder / "data").iterdir():
        path.write_bytes(b"")
    assert image_splits(dataset_name=str(folder), cache_dir=str(tmp_path / "cache")) == ["train", "validation"]
    assert image_splits() == ["train", "test"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"validation_dir": "no/such"}, "--validation_dir no/such is not a folder"),
        ({"validation_files": ["no/such/*.tar"]}, "--validation_files: no file matches"),
        ({"validation_files": ["http://localhost/a.zip"]}, "--validation_files takes .parquet or .tar"),
    ],
)
def test_the_flag_that_names_held_out_images_is_blamed_for_them(values, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**values).open_held_out()


@pytest.mark.parametrize("key", ["imagenet_a", "imagenet_r", "imagenet_sketch"])
def test_the_flag_that_names_a_further_test_set_is_blamed_for_it(tmp_path, key):
    folders = dict.fromkeys(("imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet_c"))
    with pytest.raises(ValueError, match=f"--{key}_dir no/such is not a folder"):
        imagenet_tests(
            {**folders, key: "no/such"},
            imagenet_wnids("a"),
            image_size=(16, 16),
            loader_of=lambda *images: None,
            tester_of=lambda model: None,
        )
