"""`open_image_source` opens data as the user's flags name them, as an `ImageSource`."""

import os
from collections.abc import Callable, Sequence
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from .base import ArraySource, ImageSource
from .idx import idx_splits, is_idx_folder, open_idx_folder

__all__ = ["ArraySource", "ImageSource", "open_image_source"]

DIGITS = "digits"
DIGITS_SPLITS = ("train", "test")
# names that a folder of one split goes by
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
BUILDER_BY_SUFFIX = {".parquet": "parquet", ".tar": "webdataset"}


class FolderKind(NamedTuple):
    """A kind of folder that `train_dir` may name, beside folders of image files."""

    recognises: Callable[[str | os.PathLike[str]], bool]  # whether a folder is of this kind
    splits: Callable[[str | os.PathLike[str]], list[str]]  # those of which it has images
    open: Callable[[str | os.PathLike[str], str], ImageSource]  # one of them


FOLDER_KINDS = [FolderKind(is_idx_folder, idx_splits, open_idx_folder)]


def open_image_source(
    *,
    split: str = "train",
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_dir: str | os.PathLike[str] | None = None,
    data_files: str | Sequence[str] | None = None,
    streaming: bool = False,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    flag: str | None = None,
) -> ImageSource:
    """Opens a split of a data set; images stay encoded until a loader decodes them.

    With neither `dataset_name`, `train_dir` nor `data_files`, it is the embedded data set "digits".

    Args:
        dataset_name: "digits", or a name or local path for 🤗 Datasets; `dataset_config_name` is its configuration.
        train_dir: a folder of images, whose class folders are the labels (🤗 Datasets' `imagefolder`), or of IDX
            files. It is read in place, streaming or not.
        data_files: parquet or WebDataset (.tar) files, a path, glob pattern or URL, or a list of them.
        streaming: read parquet or tar shards in place, possibly over a network, instead of converting them to an
            Arrow file on disk first.
        image_column_name, label_column_name: default to the first column of type `Image` and `ClassLabel`, else to
            "image" and "label"; in WebDataset files to jpg, jpeg, png or webp and to cls.
        cache_dir: where 🤗 Datasets converts to, and where listings of shards are kept; default: its own cache.
        flag: what the user named the place by, for messages; default: "--train_dir" or "--data_files".

    Raises:
        ValueError: more than one place named; no such folder, file, split or column (lists those there are); no
            image; no access on the Hub; files of a kind that cannot be read.
    """
    places = {"dataset_name": dataset_name, "train_dir": train_dir, "data_files": data_files}
    named = [f"--{key}" for key, value in places.items() if value]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} name different data: give one of them")
    if dataset_name == DIGITS or not named:
        return open_digits(split)
    if train_dir and (kind := _folder_kind(train_dir, flag or "--train_dir")):
        return kind.open(train_dir, split)

    from .hugging_face import open_dataset  # the digits need none of it, and start two seconds sooner

    if data_files:
        name, place = flag or "--data_files", _shards(data_files, split, flag or "--data_files")
    else:
        name, place = _folder_or_name(dataset_name, dataset_config_name, train_dir)
    return open_dataset(
        name,
        place,
        split=split,
        streaming=streaming and not train_dir,
        columns=(image_column_name, label_column_name),
        cache_dir=cache_dir,
    )


def image_splits(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> list[str]:
    """The splits of what `open_image_source` would open. Raises: ValueError, no such folder, no access to the Hub."""
    if dataset_name == DIGITS or not (dataset_name or train_dir):
        return list(DIGITS_SPLITS)
    if train_dir and (kind := _folder_kind(train_dir, "--train_dir")):
        return kind.splits(train_dir)

    from .hugging_face import dataset_splits

    return dataset_splits(*_folder_or_name(dataset_name, dataset_config_name, train_dir), cache_dir)


def open_digits(split: str) -> ArraySource:
    """Scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, cut 80/20 with every class in proportion.

    The cut is fixed, so that "test" is the same everywhere; grey values 0..16 are spread over 0..255.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if split not in DIGITS_SPLITS:
        raise ValueError(f"{DIGITS} has no split {split!r}; it has {list(DIGITS_SPLITS)}")
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=digits.target)
    rows = np.sort(train if split == "train" else test)
    names = [str(name) for name in digits.target_names]
    return ArraySource(images[rows], digits.target[rows], name=f"{DIGITS}[{split}]", label_names=names)


def folder_patterns(folder: Path) -> dict[str, list[str]]:
    """Which files of a folder of images are of which split, as patterns for 🤗 Datasets.

    Folders named like splits are splits if there are no other folders, or if they hold the folders of the classes;
    otherwise all images are for training. 🤗 Datasets by itself also goes by the names of files: of ImageNet's
    `ILSVRC2012_val_….JPEG` it makes a validation split, of a folder with one `my train.jpg` it takes that image alone.
    """
    split_of = {name: split for split, names in SPLIT_FOLDERS.items() for name in names}
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    named = [path for path in folders if path.name.lower() in split_of]
    patterns: dict[str, list[str]] = {}
    for path in named:
        if named == folders or any(child.is_dir() for child in path.iterdir()):
            patterns.setdefault(split_of[path.name.lower()], []).append(f"{path.name}/**")
    return patterns or {"train": ["**"]}


def _folder_kind(folder: str | os.PathLike[str], flag: str) -> FolderKind | None:
    """None where it is a folder of images, which 🤗 Datasets reads."""
    if not Path(folder).is_dir():
        raise ValueError(f"{flag} {folder} is not a folder")
    return next((kind for kind in FOLDER_KINDS if kind.recognises(folder)), None)


def _folder_or_name(
    dataset_name: str | None, dataset_config_name: str | None, train_dir: str | os.PathLike[str] | None
) -> tuple[str, dict[str, Any]]:
    """What the user calls it, and what 🤗 Datasets is to load."""
    if train_dir:
        files = folder_patterns(Path(train_dir))
        return str(train_dir), {"path": "imagefolder", "data_dir": str(train_dir), "data_files": files}
    return str(dataset_name), {"path": dataset_name, "name": dataset_config_name}


def _shards(data_files: str | Sequence[str], split: str, flag: str) -> dict[str, Any]:
    """What 🤗 Datasets is to load: patterns are expanded in order, the builder follows from the suffix."""
    files = []
    for pattern in [data_files] if isinstance(data_files, str) else data_files:
        found = sorted(glob(pattern, recursive=True)) if has_magic(pattern) and "://" not in pattern else [pattern]
        if not found or ("://" not in pattern and not Path(found[0]).is_file()):
            raise ValueError(f"{flag}: no file matches {pattern}")
        files += found
    suffixes = {PurePosixPath(file).suffix.lower() for file in files}
    if len(suffixes) != 1 or not suffixes <= set(BUILDER_BY_SUFFIX):
        raise ValueError(f"{flag} takes .parquet or .tar files, all of one kind, got {sorted(suffixes)}")
    return {"path": BUILDER_BY_SUFFIX[suffixes.pop()], "data_files": {split: files}}
