"""The flags of `run_semantic_segmentation.py` and `run_object_detection.py`, beside those of the model and the Hub."""

from dataclasses import dataclass
from typing import ClassVar

from .downstream import DownstreamArguments
from .option import CheckedArguments, RecipeError, option

# sizes of Mask R-CNN
DETECTOR_FLAGS = (
    "pyramid_channels",
    "head_channels",
    "box_features",
    "rpn_batch_size_per_image",
    "rpn_post_nms_top_n",
    "box_batch_size_per_image",
)


@dataclass
class DenseDataArguments(CheckedArguments):
    """How images are read and flipped."""

    # a flag of the first replaces all of the second that a recipe names: see `parse_arguments`
    PLACES: ClassVar[tuple[str, ...]] = ()
    DATA_KEYS: ClassVar[tuple[str, ...]] = ()

    dataloader_num_workers: int = option(
        0, "Processes that read and decode, for each training process; no influence on what is seen."
    )
    max_bad_image_fraction: float = option(0.01, "Stop when more than this part of the images cannot be decoded.")
    horizontal_flip: float = option(0.5, "Probability of a flip.")

    NOT_NEGATIVE: ClassVar = ("dataloader_num_workers",)

    def __post_init__(self):
        super().__post_init__()
        self._check("in 0..1", lambda value: 0 <= value <= 1, "max_bad_image_fraction", "horizontal_flip")


@dataclass
class SegmentationDataArguments(DenseDataArguments):
    """Images with a mask of classes; `data.segmentation.open_segmentation_source` says how they are found."""

    # one of them says where the images are, and these say more about them
    PLACES: ClassVar = ("train_dir", "dataset_name", "data_files")
    DATA_KEYS: ClassVar = (
        *PLACES,
        "validation_files",
        "dataset_config_name",
        "train_split",
        "validation_split",
        "image_column_name",
        "annotation_column_name",
        "class_names_file",
        "num_classes",
        "reduce_zero_label",
    )

    train_dir: str | None = option(
        None, "A folder of images/SPLIT and, with the same names, masks/SPLIT or annotations/SPLIT, as ADE20K's."
    )
    dataset_name: str | None = option(None, "A name or local path for 🤗 Datasets.")
    dataset_config_name: str | None = option(None, "The configuration of --dataset_name.")
    data_files: list[str] | None = option(None, "Parquet files: paths, globs or URLs.")
    validation_files: list[str] | None = option(None, "With --data_files: the same for validation.")
    train_split: str = option("train", "The split to train on.")
    validation_split: str = option("validation", "The split to validate on.")
    image_column_name: str | None = option(None, "Default: the first column of type Image that is no annotation.")
    annotation_column_name: str | None = option(
        None, "Default: the column of type Image called annotation, label, mask or segmentation."
    )
    class_names_file: str | None = option(None, "Names of the classes, one a line.")
    num_classes: int | None = option(None, "Where nothing names them; default: by the largest value of all masks.")
    reduce_zero_label: bool = option(False, "Value 0 of a mask is no class and is ignored, and 1 is class 0: ADE20K.")
    cache_dir: str | None = option(None, "Default: the cache of 🤗 Datasets.")

    def __post_init__(self):
        super().__post_init__()
        self._check("at least 2", lambda value: value >= 2, "num_classes")
        named = [name for name in self.PLACES if getattr(self, name)]
        if len(named) > 1:
            raise RecipeError(f"{' and '.join(named)} name different data: give one of them")
        if bool(self.data_files) != bool(self.validation_files):
            raise RecipeError("data_files and validation_files go together: give both")


@dataclass
class DetectionDataArguments(DenseDataArguments):
    """Images with COCO's annotations; see `data.coco.CocoSource`."""

    PLACES: ClassVar = ("train_annotation_file", "validation_annotation_file")
    DATA_KEYS: ClassVar = (*PLACES, "train_image_dir", "validation_image_dir", "keep_empty_images")

    train_annotation_file: str | None = option(None, "JSON in the format of COCO's instances_train2017.json.")
    train_image_dir: str | None = option(None, "The folder that the file names in it start from.")
    validation_annotation_file: str | None = option(None, "The same for validation.")
    validation_image_dir: str | None = option(None, "The same for validation.")
    keep_empty_images: bool = option(False, "Train on images without any object, too.")

    def __post_init__(self):
        super().__post_init__()
        for split in ("train", "validation"):
            file, folder = f"{split}_annotation_file", f"{split}_image_dir"
            if (getattr(self, file) is None) != (getattr(self, folder) is None):
                raise RecipeError(f"{file} and {folder} go together: give both")


@dataclass
class DenseArguments(DownstreamArguments):
    """Optimisation in steps, at a learning rate that does not follow from the batch."""

    learning_rate: float = option(1e-4, "The peak, whatever the batch is.")
    warmup_steps: int = option(1500, "Optimiser steps, linear from warmup_learning_rate.")

    POSITIVE: ClassVar = (*DownstreamArguments.POSITIVE, "learning_rate")
    NOT_NEGATIVE: ClassVar = (*DownstreamArguments.NOT_NEGATIVE, "warmup_steps")


def check_scales(smallest: float, largest: float) -> None:
    """Raises a RecipeError where a range of scales is none."""
    if not 0 < smallest <= largest:
        raise RecipeError(f"min_scale={smallest} and max_scale={largest} must be positive, the smaller first")


@dataclass
class SegmentationArguments(DenseArguments):
    """UperNet on ADE20K, as MAE (He et al. 2022, appendix A.4) and BEiT have it."""

    layer_decay: float = option(0.65, "The learning rate of each block, over that of the next.")
    poly_power: float = option(1.0, "After the warm-up the learning rate falls to 0 by this power of what is left.")

    crop_size: int = option(512, "Side of a training crop and of the window that slides over a test image, in pixels.")
    short_side: int | None = option(None, "Images are resized to fit short and long side; default: crop_size.")
    long_side_limit: int = option(2048, "See short_side.")
    min_scale: float = option(0.5, "Training images are resized by a random factor from here, on top")
    max_scale: float = option(2.0, "… to here.")
    photometric_distortion: bool = option(True, "Training: random brightness, contrast, saturation and hue.")
    stride: int | None = option(
        None, "By how many pixels the window slides; default: 2/3 of crop_size. What several windows see is averaged."
    )

    upernet_channels: int = option(768, "Width of UperNet's head.")
    auxiliary_channels: int = option(256, "Width of the auxiliary head.")

    AT_LEAST_1: ClassVar = (
        *DenseArguments.AT_LEAST_1,
        "crop_size",
        "short_side",
        "long_side_limit",
        "stride",
        "upernet_channels",
        "auxiliary_channels",
    )
    POSITIVE: ClassVar = (*DenseArguments.POSITIVE, "poly_power")

    def __post_init__(self):
        super().__post_init__()
        check_scales(self.min_scale, self.max_scale)
        self._check(
            "2 or more: UperNet normalises over the batch, and its coarsest map has one place for each image",
            lambda value: value >= 2,
            "per_device_train_batch_size",
        )
        if self.short_side is None:
            self.short_side = self.crop_size
        if self.stride is None:
            self.stride = max(1, 2 * self.crop_size // 3)  # 341 of 512
        if self.long_side_limit < self.short_side:
            raise RecipeError(f"long_side_limit={self.long_side_limit} is below short_side={self.short_side}")
        if self.stride > self.crop_size:
            raise RecipeError(
                f"stride={self.stride} is above crop_size={self.crop_size}: no window would see what lies between"
            )


@dataclass
class DetectionArguments(DenseArguments):
    """Mask R-CNN on COCO, as ViTDet (Li et al. 2022, appendix A.2); the side of images is the model's image_size."""

    layer_decay: float = option(0.7, "The learning rate of each block, over that of the next.")
    weight_decay: float = option(0.1, "On parameters with more than one dimension that are not biases.")
    warmup_steps: int = option(250, "Optimiser steps, linear from warmup_learning_rate.")
    lr_milestones: list[int] | None = option(None, "Steps from which on the learning rate is multiplied by lr_gamma.")
    lr_gamma: float = option(0.1, "See lr_milestones.")

    min_scale: float = option(0.1, "Training images are resized by a random factor from here, times image_size")
    max_scale: float = option(2.0, "… to here.")
    pyramid_channels: int = option(256, "Width of the feature pyramid.")
    head_channels: int = option(256, "Width of the four convolutions of the box head, and of the mask head.")
    box_features: int = option(1024, "Width of the box head's last layer.")
    rpn_batch_size_per_image: int = option(256, "Anchors of an image that the proposal network's losses are of.")
    rpn_post_nms_top_n: int = option(
        1000, "Proposals of an image that are looked at; a level of the pyramid gives as many, in training twice."
    )
    box_batch_size_per_image: int = option(512, "Proposals of an image that the heads' losses are of.")
    score_threshold: float = option(0.05, "Detections below this score are left out.")

    AT_LEAST_1: ClassVar = (*DenseArguments.AT_LEAST_1, *DETECTOR_FLAGS)
    POSITIVE: ClassVar = (*DenseArguments.POSITIVE, "lr_gamma")

    def __post_init__(self):
        super().__post_init__()
        check_scales(self.min_scale, self.max_scale)
        self._check("in 0..1, below 1", lambda value: 0 <= value < 1, "score_threshold")
        self._check(
            "positive and ascending",
            lambda steps: steps and steps[0] > 0 and steps == sorted(set(steps)),
            "lr_milestones",
        )
