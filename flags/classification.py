"""The flags of `run_image_classification.py`, beside those of the model, the data and the Hub."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..evaluation.robustness import CORRUPTIONS
from .data import DataArguments
from .downstream import DownstreamArguments
from .option import RecipeError, option
from .run import CropArguments

ALL_CORRUPTIONS = "all"


@dataclass
class ClassificationDataArguments(DataArguments):
    """The data of a classifier: a part of it may do, and other sets may test it."""

    min_crop_scale: float = option(0.08, "The smallest random crop, as a part of the image's area.")
    train_fraction: float | None = option(None, "Train on this part of each class: 0.01 for 1 % fine-tuning.")
    train_subset_file: str | None = option(None, "Train on the images that this file names, one a line.")

    imagenet_a_dir: str | None = option(None, "finetune and evaluate: test on ImageNet-A, 200 class folders.")
    imagenet_r_dir: str | None = option(None, "finetune and evaluate: test on ImageNet-R, 200 class folders.")
    imagenet_sketch_dir: str | None = option(
        None, "finetune and evaluate: test on ImageNet-Sketch, 1,000 class folders."
    )
    imagenet_c_dir: str | None = option(
        None, "finetune and evaluate: test on ImageNet-C, corruption/severity/class folders."
    )
    corruptions: list[str] | None = option(
        None, "finetune and evaluate: corrupt the held-out images on the fly in these ways; all: 15."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.samples_per_epoch is not None:
            raise RecipeError("samples_per_epoch is for pre-training: see train_fraction")
        if self.train_fraction is not None and not 0 < self.train_fraction <= 1:
            raise RecipeError(f"train_fraction={self.train_fraction} must lie above 0 and at most at 1")
        if self.train_fraction is not None and self.train_subset_file is not None:
            raise RecipeError("train_fraction and train_subset_file both choose training images: give one of them")
        if unknown := set(self.corruptions or ()) - {*CORRUPTIONS, ALL_CORRUPTIONS}:
            raise RecipeError(f"corruptions: no {sorted(unknown)}; there are {', '.join(CORRUPTIONS)}, or all")
        if ALL_CORRUPTIONS in (self.corruptions or ()):
            self.corruptions = list(CORRUPTIONS)


@dataclass
class ClassificationArguments(DownstreamArguments, CropArguments):
    """One task, and its optimisation: fine-tuning as He et al. 2022, Table 9; linear probing as Table 10."""

    task: Literal["finetune", "linear_probe", "knn", "evaluate"] = option("finetune", "What is done with the model.")
    warmup_epochs: float = option(5.0, "Linear from warmup_learning_rate.")
    per_device_eval_batch_size: int | None = option(None, "Default: that of training.")
    min_learning_rate: float = option(1e-6, "Where the half-cosine ends.")

    base_learning_rate: float = option(1e-3, "Fine-tuning: lr = base_learning_rate * batch / 256.")
    auto_augment: str = option("rand-m9-mstd0.5-inc1", "Fine-tuning: RandAugment in timm's notation, or none.")
    random_erasing: float = option(0.25, "Fine-tuning: probability of erasing a rectangle.")
    mixup: float = option(0.8, "Fine-tuning: alpha of mixup; 0: off.")
    cutmix: float = option(1.0, "Fine-tuning: alpha of cutmix; 0: off.")
    label_smoothing: float = option(0.1, "Fine-tuning.")
    ema_decay: float | None = option(None, "Fine-tuning: test and keep an average of the weights of this decay.")

    probe_learning_rates: list[float] = option(
        [0.01, 0.03, 0.1, 0.3, 1.0], "Linear probe: base learning rates, one head each, trained at once by LARS."
    )
    feature_pooling: Literal["cls", "mean"] | None = option(
        None, "Linear probe and k-NN: class token, or mean of patches; default: class token where there is one."
    )
    knn_k: list[int] = option([10, 20, 100, 200], "k-NN: neighbours that vote.")
    knn_temperature: float = option(0.07, "k-NN: a neighbour votes with exp(similarity / temperature).")

    AT_LEAST_1: ClassVar = (*DownstreamArguments.AT_LEAST_1, "per_device_eval_batch_size")
    POSITIVE: ClassVar = (*DownstreamArguments.POSITIVE, "base_learning_rate", "knn_temperature")
    NOT_NEGATIVE: ClassVar = (
        *DownstreamArguments.NOT_NEGATIVE,
        "warmup_epochs",
        "min_learning_rate",
        "mixup",
        "cutmix",
    )
    FRACTIONS: ClassVar = (*DownstreamArguments.FRACTIONS, *CropArguments.FRACTIONS)

    def __post_init__(self):
        super().__post_init__()
        self._check("in 0..1, below 1", lambda value: 0 <= value < 1, "label_smoothing", "ema_decay")
        self._check("in 0..1", lambda value: 0 <= value <= 1, "random_erasing")
        if self.task == "linear_probe" and self.max_grad_norm is not None:
            raise RecipeError("max_grad_norm would let one head of the probe slow down the others: leave it out")
        self._check("positive numbers", lambda values: values and min(values) > 0, "probe_learning_rates", "knn_k")
