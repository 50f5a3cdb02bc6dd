"""The flags of `run_semantic_segmentation.py` and `run_object_detection.py`, beside those of the model and the Hub."""

from dataclasses import dataclass
from typing import ClassVar

from .data import ReadingArguments
from .downstream import DownstreamArguments
from .option import RecipeError, changed, detail, of_schedule, option, place


@dataclass
class SegmentationDataArguments(ReadingArguments):
    """Images with a mask of classes; `data.sources.segmentation.open_segmentation_source` says how they are found."""

    train_dir: str | None = place(
        "A folder of images/SPLIT and, with the same names, masks/SPLIT or annotations/SPLIT, as ADE20K's."
    )
    dataset_name: str | None = place("A name or local path for 🤗 Datasets.")
    dataset_config_name: str | None = detail(None, "The configuration of --dataset_name.")
    data_files: list[str] | None = place("Parquet files: paths, globs or URLs.")
    validation_files: list[str] | None = detail(None, "Parquet files to validate on.", affects_result=False)
    train_split: str = detail("train", "The split to train on.")
    validation_split: str = detail("validation", "The split to validate on.", affects_result=False)
    image_column_name: str | None = detail(None, "Column of the images.", unset="the first Image but the masks'")
    annotation_column_name: str | None = detail(
        None, "Column of the masks.", unset="the Image called annotation, label, mask or segmentation"
    )
    class_names_file: str | None = detail(None, "Names of the classes, one a line.")
    num_classes: int | None = detail(
        None, "Number of classes, where nothing names them.", unset="by the largest value of all masks", at_least=2
    )
    reduce_zero_label: bool = detail(False, "Value 0 of a mask is no class, and 1 is class 0, as in ADE20K.")
    cache_dir: str | None = option(
        None, "Where data sets are kept.", unset="the cache of 🤗 Datasets", affects_result=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_one_place("train_dir", "dataset_name", "data_files")
        if bool(self.data_files) != bool(self.validation_files):
            raise RecipeError("data_files and validation_files go together: give both")


@dataclass
class DetectionDataArguments(ReadingArguments):
    """Images with COCO's annotations; see `data.sources.coco.CocoSource`."""

    train_annotation_file: str | None = place("JSON in the format of COCO's instances_train2017.json.")
    train_image_dir: str | None = detail(None, "The folder that the file names in it start from.")
    validation_annotation_file: str | None = place("As --train_annotation_file, to validate on.", affects_result=False)
    validation_image_dir: str | None = detail(None, "As --train_image_dir, to validate on.", affects_result=False)
    keep_empty_images: bool = detail(False, "Train also on images without any object.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for split in ("train", "validation"):
            file, folder = f"{split}_annotation_file", f"{split}_image_dir"
            if (getattr(self, file) is None) != (getattr(self, folder) is None):
                raise RecipeError(f"{file} and {folder} go together: give both")


@dataclass
class DenseArguments(DownstreamArguments):
    """Optimisation in steps, at a learning rate that does not follow from the batch, and random sizes of images."""

    learning_rate: float = of_schedule(1e-4, "Peak of the learning rate, whatever the batch is.", above=0)
    warmup_steps: int = of_schedule(1500, "Steps of the linear warm-up from warmup_learning_rate.", at_least=0)
    min_scale: float = option(
        0.5, "Training: smallest random factor on short_side or image_size.", affects_result=True, under="augmentation"
    )
    max_scale: float = option(2.0, "Training: the largest.", affects_result=True, under="augmentation")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.min_scale <= self.max_scale:
            raise RecipeError(
                f"min_scale={self.min_scale} and max_scale={self.max_scale} must be positive, the smaller first"
            )


@dataclass
class SegmentationArguments(DenseArguments):
    """UperNet on ADE20K, as MAE (He et al. 2022, appendix A.4) and BEiT have it."""

    HEADING: ClassVar = "augmentation"

    layer_decay: float = changed(DownstreamArguments, "layer_decay", default=0.65)
    poly_power: float = of_schedule(
        1.0, "After the warm-up the rate falls to 0 by this power of what is left.", above=0, under="optimisation"
    )

    crop_size: int = option(
        512, "Side in pixels of training crops and windows sliding over test images.", at_least=1, affects_result=True
    )
    short_side: int | None = option(None, "Short side of images.", unset="crop_size", at_least=1, affects_result=True)
    long_side_limit: int = option(2048, "No image is resized to a longer long side.", at_least=1, affects_result=True)
    photometric_distortion: bool = option(True, "Random brightness, contrast, saturation, hue.", affects_result=True)
    stride: int | None = option(
        None,
        "By how many pixels the window slides; what several windows see is averaged.",
        unset="2/3 of crop_size",
        at_least=1,
        affects_result=False,
        under="evaluation",
    )

    upernet_channels: int = option(768, "Width of UperNet's head.", at_least=1, affects_result=True, under="model")
    auxiliary_channels: int = option(256, "Auxiliary head's width.", at_least=1, affects_result=True, under="model")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_device_train_batch_size < 2:
            raise RecipeError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} must be 2 or more: UperNet "
                "normalises over the batch, and its coarsest map has one place for each image"
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

    HEADING: ClassVar = "model"

    layer_decay: float = changed(DownstreamArguments, "layer_decay", default=0.7)
    weight_decay: float = changed(DownstreamArguments, "weight_decay", default=0.1)
    warmup_steps: int = changed(DenseArguments, "warmup_steps", default=250)
    lr_milestones: list[int] | None = of_schedule(
        None, "Steps from which on the learning rate is multiplied by lr_gamma.", under="optimisation"
    )
    lr_gamma: float = of_schedule(0.1, "The factor at lr_milestones.", above=0, under="optimisation")

    min_scale: float = changed(DenseArguments, "min_scale", default=0.1)
    pyramid_channels: int = option(256, "Width of the feature pyramid.", at_least=1, affects_result=True)
    head_channels: int = option(256, "Width of both heads' four convolutions.", at_least=1, affects_result=True)
    box_features: int = option(1024, "Width of the box head's last layer.", at_least=1, affects_result=True)
    rpn_batch_size_per_image: int = option(
        256, "Anchors of an image in the losses of proposals.", at_least=1, affects_result=True, under="optimisation"
    )
    rpn_post_nms_top_n: int = option(
        1000,
        "Proposals of an image that the heads look at; each level of the pyramid gives as many, in training twice.",
        at_least=1,
        affects_result=True,
    )
    box_batch_size_per_image: int = option(
        512, "Proposals of an image that the heads' losses see.", at_least=1, affects_result=True, under="optimisation"
    )
    score_threshold: float = option(
        0.05, "Detections below it are left out.", at_least=0, below=1, affects_result=False, under="evaluation"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = self.lr_milestones
        if steps is not None and not (steps and steps[0] > 0 and steps == sorted(set(steps))):
            raise RecipeError(f"lr_milestones={steps} must be positive and ascending")
