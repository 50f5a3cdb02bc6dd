"""docs/architecture.md, "Add a source of images": a source of a few lines, entered where it says, is trained on."""

import os
from pathlib import Path

import numpy as np
import pytest
from runs import metrics, pretrain

from mimae.data.sources import opening
from mimae.data.sources.base import ImageSource
from mimae.flags.data import DataArguments


class MemoryMappedSource(ImageSource):
    """SPLIT.npy: uint8 (n, H, W), mapped and not read."""

    def __init__(self, folder: str | os.PathLike, split: str):
        self.images = np.load(Path(folder) / f"{split}.npy", mmap_mode="r")
        self.name = f"{folder}[{split}]"
        self.block_sizes = np.array([len(self.images)], dtype=np.int64)
        self.fingerprint = str(self.images.shape)

    def read(self, index: int) -> tuple[np.ndarray, None]:
        return np.array(self.images[index]), None

    def describe(self, index: int) -> str:
        return f"{self.name}:{index}"

    def _stored_labels(self) -> np.ndarray:
        raise AssertionError("the images have no labels")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    kind = opening.FolderKind(
        recognises=lambda folder: (Path(folder) / "train.npy").exists(),
        splits=lambda folder: sorted(path.stem for path in Path(folder).glob("*.npy")),
        open=MemoryMappedSource,
    )
    monkeypatch.setattr(opening, "FOLDER_KINDS", [*opening.FOLDER_KINDS, kind])
    (tmp_path / "arrays").mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 8)):
        np.save(tmp_path / "arrays" / f"{split}.npy", generator.integers(0, 256, (count, 16, 16), dtype=np.uint8))
    return tmp_path / "arrays"


def test_the_flags_find_it_and_its_held_out_split(folder):
    arguments = DataArguments(train_dir=str(folder))
    assert len(arguments.open_split("train")) == 32
    assert arguments.open_held_out().name == f"{folder}[test]"


def test_pre_training_reads_it(folder, tmp_path):
    values = {"max_train_steps": 2, "per_device_train_batch_size": 8, "train_dir": folder, "num_channels": 1}
    assert pretrain(tmp_path / "run", **values) == 0
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2]
