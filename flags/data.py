"""The flags that say which data, and how it is read."""

from dataclasses import dataclass, field
from typing import Any

from ..data.sources.opening import ImageSource, image_splits, open_image_source
from .option import check_types

USUAL_HELD_OUT_SPLITS = ("validation", "test")  # the first that there is
# one of them says where the images are; a flag replaces whichever a recipe names
PLACES = ("dataset_name", "train_dir", "data_files")
# and these say more about those images: with other images they mean nothing
DATA_KEYS = (
    *PLACES,
    "dataset_config_name",
    "validation_dir",
    "validation_files",
    "train_split",
    "validation_split",
    "image_column_name",
    "label_column_name",
)


@dataclass
class DataArguments:
    """Flags of the data; `data.sources.open_image_source` and `data.loaders` say what they do.

    Raises:
        TypeError, ValueError: a field has the wrong type or value, or two name different data; names the field.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "'digits' (embedded, the default), or a name or local path for 🤗 Datasets, as ILSVRC/imagenet-1k."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The configuration of --dataset_name."})
    train_dir: str | None = field(
        default=None, metadata={"help": "A folder of images, in class folders if they have labels, or of IDX files."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "The same for validation."})
    validation_files: list[str] | None = field(
        default=None, metadata={"help": "Parquet or WebDataset files for validation."}
    )
    data_files: list[str] | None = field(
        default=None, metadata={"help": "Parquet or WebDataset (.tar) files: paths, globs or URLs."}
    )
    train_split: str = field(default="train", metadata={"help": "The split to train on."})
    validation_split: str | None = field(
        default=None, metadata={"help": "The split to validate on; default: 'validation' or 'test' if there."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read parquet or tar shards where they lie instead of converting them on disk."},
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "Default: the first column of type Image, else 'image'."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Default: the first column of type ClassLabel, else 'label'."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Default: the cache of 🤗 Datasets."})
    dataloader_num_workers: int = field(
        default=0,
        metadata={"help": "Processes that read and decode, for each training process; no influence on what is seen."},
    )
    shuffle_window: int = field(
        default=8192, metadata={"help": "Rows of a sharded stream that are shuffled together; bounds the memory."}
    )
    max_bad_image_fraction: float = field(
        default=0.01, metadata={"help": "Stop when more than this part of the images cannot be decoded."}
    )
    samples_per_epoch: int | None = field(default=None, metadata={"help": "Images per epoch; default: all."})
    min_crop_scale: float = field(
        default=0.2, metadata={"help": "The smallest random crop, as a part of the image's area."}
    )
    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of a flip; 0 for digits and letters."})

    def __post_init__(self):
        check_types(self)
        self._check_one_place()
        self._check_ranges()

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

    def _check_one_place(self) -> None:
        for places in (PLACES, ("validation_dir", "validation_files")):
            named = [name for name in places if getattr(self, name)]
            if len(named) > 1:
                raise ValueError(f"{' and '.join(named)} name different data: give one of them")

    def _check_ranges(self) -> None:
        for name in ("max_bad_image_fraction", "min_crop_scale", "horizontal_flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if self.min_crop_scale == 0:
            raise ValueError("min_crop_scale must be above 0")
        for name, least in (("dataloader_num_workers", 0), ("shuffle_window", 1), ("samples_per_epoch", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
