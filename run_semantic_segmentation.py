"""Fine-tune a pre-trained encoder for semantic segmentation, with UperNet on top, and measure its mIoU.

    accelerate launch run_semantic_segmentation.py --config recipes/ade20k/….yaml --model_name_or_path CHECKPOINT

The encoder comes from a pre-training checkpoint of this project, from facebook/vit-mae-base, or from a stock ViT;
`--untrained` takes its architecture alone, `--preset vit-base` starts from random weights. Images come from a folder
of image/mask pairs (`--train_dir`), as ADE20K's, or from 🤗 Datasets. The result is a `UperNetForSemanticSegmentation`
of transformers, which loads once `mimae` is imported.

Exit codes: 0 done; 143 after SIGTERM and 138 after SIGUSR1 while training, with a checkpoint of that very step; 1 on
an error, or when all is done but the upload failed.
"""

import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn
from transformers import SegformerImageProcessor

from mimae.data.images.segmentation_augmentation import (
    segmentation_evaluation_transform,
    segmentation_training_transform,
)
from mimae.data.images.transforms import DenseTransform
from mimae.data.sources.segmentation import SegmentationSource, open_segmentation_source
from mimae.dense.upernet import UperNet, build_upernet
from mimae.evaluation.segmentation import MeanIoU, segment
from mimae.flags.dense import SegmentationArguments, SegmentationDataArguments
from mimae.flags.option import RecipeError
from mimae.flags.scripts import SEGMENTATION
from mimae.jobs.dense import DenseRun
from mimae.pictures.segmentation import save_segmentations
from mimae.training.optimization import WarmupPolynomial
from mimae.training.processes import main_process_first, together

DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "segmentation.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the task on these flags, None being the command line's, and returns the exit code."""
    return SegmentationRun.execute_flags(argv, default_recipe=DEFAULT_RECIPE, description=__doc__)


class SegmentationRun(DenseRun):
    """UperNet on the images and the checkpoint that the flags name."""

    TASK = "segmentation"
    GROUPS = SEGMENTATION

    data_args: SegmentationDataArguments
    args: SegmentationArguments

    def __init__(self, *groups: Any):
        super().__init__(*groups)
        crop_size, patch_size = self.args.crop_size, self.patch_size
        if self.model_fields.get("image_size", crop_size) != crop_size:
            raise RecipeError(
                f"image_size={self.model_fields['image_size']}: the model sees crops of crop_size={crop_size} "
                "pixels; leave image_size out"
            )
        if crop_size % patch_size:
            raise RecipeError(
                f"crop_size={crop_size} must be a multiple of the model's patches of {patch_size} pixels"
            )

    # --- images -----------------------------------------------------------------------------------------------------

    @cached_property
    def training_images(self) -> SegmentationSource:
        """The training split."""
        return self.open_split(self.data_args.train_split, "data_files")

    @cached_property
    def held_out_images(self) -> SegmentationSource:
        """The validation split, with the classes of the training split."""
        data_args, class_names = self.data_args, self.training_images.class_names
        return self.open_split(data_args.validation_split, "validation_files", class_names)

    def open_split(self, split: str, files_flag: str, class_names: Sequence[str] | None = None) -> SegmentationSource:
        """See `open_segmentation_source`; `files_flag` names files of this split, where there are any."""
        data_args = self.data_args
        return main_process_first(
            lambda: open_segmentation_source(
                split=split,
                dataset_name=data_args.dataset_name,
                dataset_config_name=data_args.dataset_config_name,
                train_dir=data_args.train_dir,
                data_files=getattr(data_args, files_flag),
                flag=f"--{files_flag}",
                image_column_name=data_args.image_column_name,
                annotation_column_name=data_args.annotation_column_name,
                class_names=class_names,
                class_names_file=None if class_names else data_args.class_names_file,
                num_classes=None if class_names else data_args.num_classes,
                reduce_zero_label=data_args.reduce_zero_label,
                cache_dir=data_args.cache_dir,
            )
        )

    @property
    def training_transform(self) -> DenseTransform:
        """Scale jitter, crop, flip and photometric distortion."""
        args: Any = self.args  # their `__post_init__` has set what was None
        return segmentation_training_transform(
            args.crop_size,
            mean=self.mean,
            std=self.std,
            short_side=args.short_side,
            long_side_limit=args.long_side_limit,
            scale_range=(args.min_scale, args.max_scale),
            horizontal_flip=self.data_args.horizontal_flip,
            photometric_distortion=args.photometric_distortion,
        )

    @property
    def evaluation_transform(self) -> DenseTransform:
        """Resizes the whole image."""
        args: Any = self.args
        return segmentation_evaluation_transform(args.short_side, args.long_side_limit, mean=self.mean, std=self.std)

    @property
    def image_processor(self) -> SegformerImageProcessor:
        """Resizes to one window, good enough for a first look; this script's own evaluation uses sliding windows."""
        side = self.args.crop_size
        return SegformerImageProcessor(
            size={"height": side, "width": side},
            image_mean=self.mean,
            image_std=self.std,
            do_reduce_labels=self.data_args.reduce_zero_label,
        )

    # --- model ------------------------------------------------------------------------------------------------------

    def build_model(self) -> UperNet:
        """UperNet on the encoder; on several GPUs its batch statistics are those of all of them."""
        model = build_upernet(
            self.load_backbone(image_size=self.args.crop_size, add_fpn=True),
            id2label=dict(enumerate(self.training_images.class_names)),
            channels=self.args.upernet_channels,
            auxiliary_channels=self.args.auxiliary_channels,
        )
        if PartialState().num_processes > 1 and self.device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model

    def schedule(self, total_steps: int) -> WarmupPolynomial:
        """Linear up, then down to 0 by a power of what is left."""
        return WarmupPolynomial(
            peak=self.args.learning_rate,
            start=self.args.warmup_learning_rate,
            warmup_steps=self.args.warmup_steps,
            total_steps=total_steps,
            power=self.args.poly_power,
        )

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """mIoU, mAcc and aAcc of windows that slide over each image."""
        args: Any = self.args
        names = self.training_images.class_names
        metric = MeanIoU(len(names))

        def predict() -> None:
            for sample in self.held_out_samples():
                prediction = segment(
                    lambda pixel_values: model(pixel_values).logits,
                    sample.pixel_values,
                    sample.target.shape,
                    crop_size=args.crop_size,
                    stride=args.stride,
                    num_classes=len(names),
                )
                metric.add(prediction=prediction, reference=sample.target.to(self.device))
                self.remember(sample, prediction.cpu())

        together(predict)
        metric.confusion_matrix = reduce(metric.confusion_matrix.to(self.device), "sum").cpu()
        metrics: dict[str, Any] = metric.compute()
        self.per_class = dict(zip(names, metrics.pop("per_class_iou"), strict=True))
        return metrics

    def draw(self, path: Path) -> None:
        """Images, truths and predictions."""
        images, truths = zip(*(self.decoded(index) for index in self.predictions), strict=True)
        save_segmentations(images, list(self.predictions.values()), truths, self.training_images.class_names, path)


if __name__ == "__main__":
    sys.exit(main())
