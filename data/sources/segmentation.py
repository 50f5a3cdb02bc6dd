"""Images with the class of each pixel: from a folder of image/mask pairs, or whatever 🤗 Datasets resolves.

Shapes: n images in the source; C, H, W channels, height and width of one image; K classes.
"""

import csv
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from torchvision import tv_tensors

from ..images.decoding import FORMATS, BadImageError, decode_image
from ..images.masks import IGNORED_CLASS, decode_mask, turned_as
from .dense import DenseSource
from .hugging_face import DatasetSource, explained_access, find_columns
from .opening import SPLIT_FOLDERS

logger = logging.getLogger(__name__)

UNKNOWN = -1
MASK_FOLDERS = ("masks", "annotations")
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
ANNOTATION_COLUMNS = ("annotation", "annotations", "label", "labels", "mask", "masks", "segmentation", "semantic_mask")


class SegmentationSource(DenseSource):
    """Rows of (encoded image, encoded mask), the mask a PNG of class indices.

    Args:
        images, masks: sources whose rows belong together, one by one.
        class_names: of the K classes, in order of their indices.
        reduce_zero_label: value 0 means "no class", and the classes 0..K-1 are stored as 1..K (as in ADE20K).

    Raises:
        ValueError: no class, or more than 255.
    """

    def __init__(
        self,
        images: DatasetSource,
        masks: DatasetSource,
        *,
        class_names: Sequence[str],
        reduce_zero_label: bool = False,
    ):
        most = IGNORED_CLASS - reduce_zero_label
        if not 0 < len(class_names) <= most:
            raise ValueError(
                f"{images.name} has {len(class_names)} classes; there can be 1 to {most}, for value "
                f"{IGNORED_CLASS} stands for pixels that are ignored"
            )
        self.images, self.masks, self.class_names = images, masks, list(class_names)
        self.name, self.block_sizes = images.name, images.block_sizes
        self.first_value = int(reduce_zero_label)  # that of class 0
        self.class_of_value = np.full(2**16, UNKNOWN, dtype=np.int16)  # for all that a PNG can store
        self.class_of_value[[*range(self.first_value), IGNORED_CLASS]] = IGNORED_CLASS
        self.class_of_value[self.first_value :][: len(class_names)] = np.arange(len(class_names))
        identity = [images.fingerprint, masks.fingerprint, self.class_names, reduce_zero_label]
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()

    def read(self, index: int) -> tuple[bytes, bytes]:
        return self.images.read(index)[0], self.masks.read(index)[0]

    def describe(self, index: int) -> str:
        return f"{self.images.describe(index)} with its mask"  # either may be what cannot be decoded

    def decode(
        self, index: int, row: tuple[bytes, bytes], num_channels: int
    ) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Decodes a row that `read` gave.

        If EXIF says that an image is stored on its side, a mask that has the size of the stored pixels is turned with
        them; a mask that fits either way is taken to be upright.

        Returns:
            The image, uint8 (C, H, W), and its mask, uint8 (H, W): class indices, and 255 where a pixel is ignored.

        Raises:
            BadImageError: image or mask cannot be decoded, or the mask has another size.
            ValueError: the mask is in colour, or has a value that is no class; names the file and the remedy.
        """
        encoded, annotation = row
        image = decode_image(encoded, num_channels)  # (C, H, W)
        name = self.masks.describe(index)
        values = turned_as(encoded, decode_mask(annotation, name), (image.shape[1], image.shape[2]))  # (H, W)
        classes = self.class_of_value[values]  # (H, W)
        if classes.min() == UNKNOWN:
            count, first = len(self.class_names), self.first_value
            raise ValueError(
                f"{name} has a pixel of value {values[classes == UNKNOWN][0]}, but the {count} classes are stored as "
                f"{first} to {first + count - 1}, and ignored pixels as {IGNORED_CLASS}: correct --num_classes or "
                "--class_names_file, or set --reduce_zero_label if 0 stands for no class and classes are counted from "
                "1"
            )
        return tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(classes.astype(np.uint8)))


def open_segmentation_source(
    *,
    split: str = "train",
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_dir: str | os.PathLike[str] | None = None,
    data_files: str | Sequence[str] | None = None,
    image_column_name: str | None = None,
    annotation_column_name: str | None = None,
    class_names: Sequence[str] | None = None,
    class_names_file: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    reduce_zero_label: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    flag: str = "--data_files",
) -> SegmentationSource:
    """Opens a split of a segmentation set; images and masks stay encoded until a loader decodes them.

    Names of the classes come from the first of these that exists: `class_names`; `class_names_file`; what lies in
    `train_dir` (ADE20K's objectInfo150.txt; the categories of annotations/instances_SPLIT.json, the class of value 0
    being "background"); "0" to "K-1" for `num_classes`; the same for the largest value in the masks, all of which
    are read for it.

    Args:
        dataset_name: a name or local path for 🤗 Datasets; `dataset_config_name` is its configuration.
        train_dir: a folder of images/SPLIT/… and, with the same names, masks/SPLIT/….png or annotations/SPLIT/….png;
            SPLIT may also be "training", "val" and so on; a folder without splits is all for training.
        data_files: parquet files, a path, glob pattern or URL, or a list of them.
        image_column_name, annotation_column_name: default to the column of type `Image` that is called annotation,
            label, mask or segmentation, and to the first other one.
        class_names: given for a split that must have the classes of another.
        num_classes: K; must agree with the names, if there are any.
        reduce_zero_label: see `SegmentationSource`.
        cache_dir: where 🤗 Datasets converts to; default: its own cache.
        flag: what the user named `data_files` by, for messages.

    Raises:
        ValueError: no source named, or several; no such folder, split or column; images without a mask, masks without
            an image; names and number of classes that contradict each other.
    """
    places = {"dataset_name": dataset_name, "train_dir": train_dir, "data_files": data_files}
    named = [f"--{key}" for key, value in places.items() if value]
    if len(named) != 1:
        raise ValueError(f"name the data by one of --dataset_name, --train_dir and --data_files, got {named}")
    name, stored_names = str(dataset_name or train_dir or flag), None
    if train_dir:
        folder, mask_folder = _folders_of_split(Path(train_dir), split)
        dataset, stored_names = _pair_files(folder, mask_folder), _stored_class_names(Path(train_dir), mask_folder)
    else:
        place = {"path": "parquet", "data_files": {split: data_files}} if data_files else {"path": dataset_name}
        with explained_access(name):
            dataset = load_dataset(**place, name=dataset_config_name, split=split, cache_dir=cache_dir)
    if len(dataset) == 0:
        raise ValueError(f"split {split!r} of {name} is empty")
    images, masks = (
        DatasetSource(dataset, name=f"{name}[{split}]", image_column=column)
        for column in find_image_columns(dataset.features, image_column_name, annotation_column_name, name=name)
    )
    if class_names is None and class_names_file:
        class_names = read_class_names(class_names_file)
    if class_names is None and stored_names:
        class_names = stored_names[1:] if reduce_zero_label else stored_names
    if class_names is None:
        class_names = [str(number) for number in range(num_classes or _count_classes(masks, reduce_zero_label))]
    if num_classes not in (None, len(class_names)):
        raise ValueError(f"--num_classes is {num_classes}, but {name} has names for {len(class_names)} classes")
    return SegmentationSource(images, masks, class_names=class_names, reduce_zero_label=reduce_zero_label)


def read_class_names(path: str | os.PathLike[str]) -> list[str]:
    """Reads names, one a line. Raises: ValueError, no such file, or no name in it."""
    if not Path(path).is_file():
        raise ValueError(f"--class_names_file {path} is not a file")
    names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise ValueError(f"--class_names_file {path} holds no name")
    return names


def find_image_columns(
    features: Features, image_column: str | None, annotation_column: str | None, *, name: str
) -> tuple[str, str]:
    """Returns the names of the columns of images and of masks, both of type `Image`.

    Raises:
        ValueError: a named column is missing or holds no images; the columns cannot be found. Lists them.
    """
    images = [column for column, feature in features.items() if isinstance(feature, ImageFeature)]
    annotation = annotation_column or next((column for column in ANNOTATION_COLUMNS if column in images), None)
    if annotation is None or annotation not in images:
        wanted = f"column {annotation!r} of masks" if annotation else "column of masks"
        raise ValueError(
            f"{name} has no {wanted}; its columns are {list(features)}, of images {images}: set "
            "--annotation_column_name"
        )
    others = Features({column: feature for column, feature in features.items() if column != annotation})
    return find_columns(others, image_column, None, name=name)[0], annotation


def _folders_of_split(folder: Path, split: str) -> tuple[Path, Path]:
    """The folders of a split's images and of its masks."""
    images = _folder_of_split(folder / "images", split)
    for kind in MASK_FOLDERS:
        if (folder / kind).is_dir():
            return images, _folder_of_split(folder / kind, split)
    raise ValueError(f"{folder} has no folder of masks: name it {' or '.join(MASK_FOLDERS)}")


def _folder_of_split(folder: Path, split: str) -> Path:
    if not folder.is_dir():
        raise ValueError(f"--train_dir: {folder} is not a folder")
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders and split == "train":
        return folder
    names = SPLIT_FOLDERS.get(split, (split,))
    found = next((path for path in folders if path.name.lower() in names), None)
    if found is None:
        raise ValueError(f"{folder} has no split {split!r}; it has {[path.name for path in folders]}")
    return found


def _pair_files(folder: Path, mask_folder: Path) -> Dataset:
    """Paths of images and masks, sorted, as 🤗 Datasets has them."""
    images, masks = _files_by_stem(folder, SUFFIXES), _files_by_stem(mask_folder, {".png"})
    lonely = [
        f"{len(stems)} {kind}, the first {[str(files[stem]) for stem in sorted(stems)[:3]]}"
        for kind, files, stems in (
            ("image(s) without a mask", images, images.keys() - masks.keys()),
            ("mask(s) without an image", masks, masks.keys() - images.keys()),
        )
        if stems
    ]
    if lonely:
        raise ValueError(
            f"{folder} and {mask_folder} do not match: {'; '.join(lonely)}. An image and its mask have the same name, "
            "and a mask ends with .png: add what is missing, or remove what is too much"
        )
    stems = sorted(images)
    columns = {"image": [str(images[stem]) for stem in stems], "annotation": [str(masks[stem]) for stem in stems]}
    return Dataset.from_dict(columns, features=Features(dict.fromkeys(columns, ImageFeature(decode=False))))


def _files_by_stem(folder: Path, suffixes: set[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            stem = str(path.relative_to(folder).with_suffix(""))
            if stem in files:
                raise ValueError(f"{files[stem]} and {path} would share one mask: rename or remove one of them")
            files[stem] = path
    return files


def _stored_class_names(folder: Path, mask_folder: Path) -> list[str] | None:
    """The names of the values 0, 1, … of the masks, if files beside them give any."""
    ade20k = folder / "objectInfo150.txt"
    if ade20k.is_file():
        with ade20k.open(encoding="utf-8", newline="") as file:
            return ["other", *(row["Name"].strip() for row in csv.DictReader(file, delimiter="\t"))]
    coco = folder / "annotations" / f"instances_{mask_folder.name}.json"
    return _names_in_coco(coco) if coco.is_file() else None


def _names_in_coco(path: Path) -> list[str]:
    try:
        categories = json.loads(path.read_text(encoding="utf-8"))["categories"]
        names = {0: "background"} | {category["id"]: category["name"] for category in categories}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not list categories with id and name, as COCO does ({type(error).__name__}: {error}): mend "
            "it, or give --class_names_file"
        ) from error
    return [names.get(value, str(value)) for value in range(max(names) + 1)]


def _count_classes(masks: DatasetSource, reduce_zero_label: bool) -> int:
    logger.warning(
        "reading all %d masks of %s for the number of classes; --num_classes or --class_names_file would spare it",
        len(masks),
        masks.name,
    )
    largest = -1
    for index in range(len(masks)):
        try:
            values = decode_mask(masks.read(index)[0], masks.describe(index))
        except BadImageError:  # the loader will count it
            continue
        largest = max(largest, int(values[values != IGNORED_CLASS].max(initial=-1)))
    return largest + 1 - reduce_zero_label
