"""The flags that say which data, and how it is read."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..data.sources.opening import ImageSource, image_splits, open_image_source
from .option import CheckedArguments, detail, option, place

USUAL_HELD_OUT_SPLITS = ("validation", "test")  # the first that there is


@dataclass
class ReadingArguments(CheckedArguments):
    """How images are read and flipped."""

    HEADING: ClassVar = "data"

    dataloader_num_workers: int = option(
        0,
        "Processes that read and decode, for each training process; what is seen does not depend on it.",
        at_least=0,
        affects_result=False,
        under="machine",
    )
    max_bad_image_fraction: float = option(
        0.01, "Stop when a larger part of the images cannot be decoded.", at_least=0, at_most=1, affects_result=False
    )
    horizontal_flip: float = option(
        0.5, "Probability of a flip; 0 for letters.", at_least=0, at_most=1, affects_result=True, under="augmentation"
    )


@dataclass
class DataArguments(ReadingArguments):
    """Flags of the data; `data.sources.opening` and `data.batches.loaders` say what they do.

    Raises:
        TypeError, RecipeError: a field has the wrong type or value, or two name different data; names the field.
    """

    dataset_name: str | None = place(
        "digits (embedded), or a name or local path for 🤗 Datasets, such as ILSVRC/imagenet-1k.",
        unset="digits, where no other flag names images",
    )
    dataset_config_name: str | None = detail(None, "The configuration of --dataset_name.")
    train_dir: str | None = place("A folder of images, in class folders if labelled, or of IDX files.")
    validation_dir: str | None = detail(None, "Such a folder to validate on.", affects_result=False)
    data_files: list[str] | None = place("Parquet or WebDataset (.tar) files: paths, globs or URLs.")
    validation_files: list[str] | None = detail(None, "Such files to validate on.", affects_result=False)
    train_split: str = detail("train", "The split to train on.")
    validation_split: str | None = detail(
        None, "The split to validate on.", unset="validation or test, if there is one", affects_result=False
    )
    streaming: bool = option(False, "Read parquet or tar files where they lie, unconverted.", affects_result="images")
    image_column_name: str | None = detail(None, "Column of the images.", unset="the first Image, else image")
    label_column_name: str | None = detail(None, "Column of the labels.", unset="the first ClassLabel, else label")
    cache_dir: str | None = option(
        None, "Where data sets are kept.", unset="the cache of 🤗 Datasets", affects_result=False
    )
    shuffle_window: int = option(
        8192,
        "Rows of a stream that are shuffled together: more mix better and take more memory.",
        at_least=1,
        affects_result="shuffle_window",
    )
    samples_per_epoch: int | None = option(
        None, "Pre-training: images per epoch.", unset="all", at_least=1, affects_result="images_per_epoch"
    )
    min_crop_scale: float = option(
        0.2, "Smallest crop, as a part of the area.", above=0, at_most=1, affects_result=True, under="augmentation"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_one_place("dataset_name", "train_dir", "data_files")
        self._check_one_place("validation_dir", "validation_files")

    @property
    def is_local(self) -> bool:
        """Whether the images, for training or for validation, lie in files or folders that the flags name."""
        return bool(self.train_dir or self.data_files or self.validation_dir or self.validation_files)

    def open_split(self, split: str) -> ImageSource:
        """One split of the images that the flags name; see `open_image_source`."""
        return self._open(
            split,
            dataset_name=self.dataset_name,
            dataset_config_name=self.dataset_config_name,
            train_dir=self.train_dir,
            data_files=self.data_files,
        )

    def open_held_out(self) -> ImageSource | None:
        """Images that are not trained on: the folder, the files or the split that the flags name, or one there is."""
        split = self.validation_split or self.train_split
        if self.validation_dir is not None:  # a folder has no columns to name
            return open_image_source(
                split=split, train_dir=self.validation_dir, cache_dir=self.cache_dir, flag="--validation_dir"
            )
        if self.validation_files is not None:
            return self._open(split, data_files=self.validation_files, flag="--validation_files")
        if self.data_files is not None:  # all of them are for training
            return None
        if self.validation_split is not None:
            return self.open_split(self.validation_split)
        there = image_splits(
            dataset_name=self.dataset_name,
            dataset_config_name=self.dataset_config_name,
            train_dir=self.train_dir,
            cache_dir=self.cache_dir,
        )
        usual = [name for name in USUAL_HELD_OUT_SPLITS if name in there and name != self.train_split]
        return self.open_split(usual[0]) if usual else None

    def _open(self, split: str, **place: Any) -> ImageSource:
        return open_image_source(
            split=split,
            streaming=self.streaming,
            image_column_name=self.image_column_name,
            label_column_name=self.label_column_name,
            cache_dir=self.cache_dir,
            **place,
        )
