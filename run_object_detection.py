"""Fine-tune a pre-trained encoder for object detection and instance segmentation: Mask R-CNN, as in ViTDet.

    accelerate launch run_object_detection.py --config recipes/coco/….yaml --model_name_or_path CHECKPOINT

The encoder comes from a pre-training checkpoint of this project, from facebook/vit-mae-base, or from a stock ViT;
`--untrained` takes its architecture alone, `--preset vit-base` starts from random weights. Images come with
annotations in COCO's format. The result is a `mimae.dense.mask_rcnn.MaskRCNNForInstanceSegmentation`.

Exit codes: 0 done; 143 after SIGTERM and 138 after SIGUSR1 while training, with a checkpoint of that very step; 1 on
an error, or when all is done but the upload failed.
"""

import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers import DetrImageProcessor

from mimae.data.images.detection_augmentation import detection_evaluation_transform, large_scale_jitter
from mimae.data.images.transforms import DenseTransform
from mimae.data.sources.coco import CocoSource
from mimae.dense.mask_rcnn import LEVEL_STRIDES, MaskRCNNForInstanceSegmentation, build_mask_rcnn
from mimae.evaluation.detection import Record, detection_metrics, detection_records, restore_detections
from mimae.flags.dense import DetectionArguments, DetectionDataArguments
from mimae.flags.option import RecipeError
from mimae.flags.scripts import DETECTION
from mimae.jobs.dense import DenseRun
from mimae.pictures.detection import save_detections
from mimae.training.optimization import WarmupMultiStep
from mimae.training.processes import everywhere, together

CONVOLUTIONS = 4  # of a head
DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "detection.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the task on these flags, None being the command line's, and returns the exit code."""
    return DetectionRun.execute_flags(argv, default_recipe=DEFAULT_RECIPE, description=__doc__)


class DetectionRun(DenseRun):
    """Mask R-CNN on the images and the checkpoint that the flags name."""

    TASK = "detection"
    GROUPS = DETECTION

    data_args: DetectionDataArguments
    args: DetectionArguments

    def __init__(self, *groups: Any):
        super().__init__(*groups)
        height, width = self.image_size
        if height != width:
            raise RecipeError(f"image_size={height} x {width}: detection pads images to squares; give one number")
        coarsest = round(LEVEL_STRIDES[-1] * self.patch_size)
        if height % coarsest:
            raise RecipeError(
                f"image_size={height} must be a multiple of {coarsest}: the coarsest map has a place for 4 x 4 patches"
            )

    # --- images -----------------------------------------------------------------------------------------------------

    @cached_property
    def training_images(self) -> CocoSource:
        """Images with objects, or all of them."""
        data_args = self.data_args
        return open_annotated(
            "train", data_args.train_annotation_file, data_args.train_image_dir, data_args.keep_empty_images
        )

    @cached_property
    def held_out_images(self) -> CocoSource:
        """All images of the validation file."""
        data_args = self.data_args
        return open_annotated(
            "validation", data_args.validation_annotation_file, data_args.validation_image_dir, keep_empty=True
        )

    @property
    def training_transform(self) -> DenseTransform:
        """Large-scale jitter."""
        return large_scale_jitter(
            self.image_size[0],
            mean=self.mean,
            std=self.std,
            scale_range=(self.args.min_scale, self.args.max_scale),
            horizontal_flip=self.data_args.horizontal_flip,
        )

    @property
    def evaluation_transform(self) -> DenseTransform:
        """Resizes the whole image."""
        return detection_evaluation_transform(self.image_size[0], mean=self.mean, std=self.std)

    @property
    def image_processor(self) -> DetrImageProcessor:
        """Resizes with its proportions and pads to a square; it may round to a pixel less than this script does."""
        side = self.image_size[0]
        return DetrImageProcessor(
            size={"max_height": side, "max_width": side},
            pad_size={"height": side, "width": side},
            image_mean=self.mean,
            image_std=self.std,
        )

    # --- model ------------------------------------------------------------------------------------------------------

    def build_model(self) -> MaskRCNNForInstanceSegmentation:
        """Mask R-CNN on the encoder."""
        args = self.args
        return build_mask_rcnn(
            self.load_backbone(),
            id2label=dict(enumerate(self.training_images.class_names)),
            pyramid_channels=args.pyramid_channels,
            box_conv_channels=[args.head_channels] * CONVOLUTIONS,
            box_fc_channels=[args.box_features],
            mask_conv_channels=[args.head_channels] * CONVOLUTIONS,
            rpn_batch_size_per_image=args.rpn_batch_size_per_image,
            rpn_pre_nms_top_n=[2 * args.rpn_post_nms_top_n, args.rpn_post_nms_top_n],
            rpn_post_nms_top_n=[args.rpn_post_nms_top_n] * 2,
            box_batch_size_per_image=args.box_batch_size_per_image,
            box_score_threshold=args.score_threshold,
        )

    def schedule(self, total_steps: int) -> WarmupMultiStep:
        """Linear up, then down in steps."""
        return WarmupMultiStep(
            peak=self.args.learning_rate,
            start=self.args.warmup_learning_rate,
            warmup_steps=self.args.warmup_steps,
            total_steps=total_steps,
            milestones=tuple(self.args.lr_milestones or ()),
            gamma=self.args.lr_gamma,
        )

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """COCO's average precision and recall of boxes and masks."""
        source = self.held_out_images
        records: list[Record] = []
        image_ids: list[int] = []

        def detect() -> None:
            for sample in self.held_out_samples():
                sizes = {name: sample.target[name] for name in ("image_size", "original_size")}
                output = model(sample.pixel_values[None], image_sizes=[sizes["image_size"]])
                detections = restore_detections(output.detections[0], **sizes)
                image_ids.append(source.image_ids[sample.index])
                records.extend(detection_records(detections, image_id=image_ids[-1], category_ids=source.category_ids))
                self.remember(sample, detections)

        together(detect)
        records, image_ids = everywhere(records), everywhere(image_ids)
        return detection_metrics(source.name, records, image_ids=image_ids)

    def draw(self, path: Path) -> None:
        """Objects, and what was detected."""
        images, truths = zip(*(self.decoded(index) for index in self.predictions), strict=True)
        save_detections(images, list(self.predictions.values()), truths, self.training_images.class_names, path)


def open_annotated(split: str, annotation_file: str | None, image_dir: str | None, keep_empty: bool) -> CocoSource:
    """Images with COCO's annotations.

    Raises:
        RecipeError: the flags of this split are missing.
        ValueError: there is no object at all; see also `CocoSource`.
    """
    if annotation_file is None or image_dir is None:
        raise RecipeError(f"there are no images: give --{split}_annotation_file and --{split}_image_dir")
    source = CocoSource(annotation_file, image_dir, keep_empty=keep_empty)
    if source.num_objects == 0:
        raise ValueError(f"{annotation_file} has no object that can be used")
    return source


if __name__ == "__main__":
    sys.exit(main())
