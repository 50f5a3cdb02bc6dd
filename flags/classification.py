"""The flags of `run_image_classification.py`, beside those of the model, the data and the Hub."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..evaluation.robustness import CORRUPTIONS
from .data import DataArguments
from .downstream import DownstreamArguments
from .option import RecipeError, changed, of_schedule, option
from .run import CropArguments

ALL_CORRUPTIONS = "all"


@dataclass
class ClassificationDataArguments(DataArguments):
    """The data of a classifier: a part of it may do, and other sets may test it."""

    HEADING: ClassVar = "evaluation"

    min_crop_scale: float = changed(DataArguments, "min_crop_scale", default=0.08)
    samples_per_epoch: int | None = changed(DataArguments, "samples_per_epoch", affects_result=False)  # and refused
    train_fraction: float | None = option(
        None,
        "Train on this part of each class: 0.01 for 1 % fine-tuning.",
        unset="all",
        above=0,
        at_most=1,
        affects_result="images",
        under="data",
    )
    train_subset_file: str | None = option(
        None, "Train on the images named in this file, one a line.", unset="all", affects_result="images", under="data"
    )

    imagenet_a_dir: str | None = option(None, "finetune, evaluate: ImageNet-A, 200 folders.", affects_result=False)
    imagenet_r_dir: str | None = option(None, "finetune, evaluate: ImageNet-R, 200 folders.", affects_result=False)
    imagenet_sketch_dir: str | None = option(
        None, "finetune, evaluate: ImageNet-Sketch, 1,000 class folders.", affects_result=False
    )
    imagenet_c_dir: str | None = option(
        None, "finetune, evaluate: ImageNet-C, corruption/severity/class folders.", affects_result=False
    )
    corruptions: list[str] | None = option(
        None, "finetune, evaluate: test on held-out images corrupted in these ways; all: 15.", affects_result=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples_per_epoch is not None:
            raise RecipeError("samples_per_epoch is for pre-training: see train_fraction")
        if self.train_fraction is not None and self.train_subset_file is not None:
            raise RecipeError("train_fraction and train_subset_file both choose training images: give one of them")
        if unknown := set(self.corruptions or ()) - {*CORRUPTIONS, ALL_CORRUPTIONS}:
            raise RecipeError(f"corruptions: no {sorted(unknown)}; there are {', '.join(CORRUPTIONS)}, or all")
        if ALL_CORRUPTIONS in (self.corruptions or ()):
            self.corruptions = list(CORRUPTIONS)


@dataclass
class ClassificationArguments(DownstreamArguments, CropArguments):
    """One task, and its optimisation: fine-tuning as He et al. 2022, Table 9; linear probing as Table 10."""

    HEADING: ClassVar = "optimisation"

    task: Literal["finetune", "linear_probe", "knn", "evaluate"] = option(
        "finetune", "What is done with the model.", affects_result=True, under="task"
    )
    warmup_epochs: float = of_schedule(5.0, "Epochs of the linear warm-up from warmup_learning_rate.", at_least=0)
    per_device_eval_batch_size: int | None = option(
        None,
        "Images per process and forward pass when testing.",
        unset="per_device_train_batch_size",
        at_least=1,
        affects_result=False,
        under="evaluation",
    )
    min_learning_rate: float = of_schedule(1e-6, "The learning rate at the end of the half-cosine.", at_least=0)

    base_learning_rate: float = of_schedule(1e-3, "Fine-tuning: peak learning rate, times batch / 256.", above=0)
    auto_augment: str = option(
        "rand-m9-mstd0.5-inc1", "Fine-tuning: timm's RandAugment, or none.", affects_result=True, under="augmentation"
    )
    random_erasing: float = option(
        0.25, "Fine-tuning: how probable it is.", at_least=0, at_most=1, affects_result=True, under="augmentation"
    )
    mixup: float = option(0.8, "Fine-tuning: alpha; 0: off.", at_least=0, affects_result=True, under="augmentation")
    cutmix: float = option(1.0, "Fine-tuning: alpha; 0: off.", at_least=0, affects_result=True, under="augmentation")
    label_smoothing: float = option(
        0.1, "Fine-tuning: part of a target that is spread over all classes.", at_least=0, below=1, affects_result=True
    )
    ema_decay: float | None = option(
        None, "Fine-tuning: test and keep averaged weights, with this decay.", at_least=0, below=1, affects_result=True
    )

    probe_learning_rates: list[float] = option(
        [0.01, 0.03, 0.1, 0.3, 1.0],
        "Linear probe: base learning rates; LARS trains one head for each, at once.",
        above=0,
        affects_result=True,
        under="probe and k-NN",
    )
    feature_pooling: Literal["cls", "mean"] | None = option(
        None,
        "Linear probe and k-NN: features are the class token, or the mean of the patches.",
        unset="cls where there is a class token",
        affects_result="feature_pooling",
        under="probe and k-NN",
    )
    knn_k: list[int] = option(
        [10, 20, 100, 200], "k-NN: how many neighbours vote.", above=0, affects_result=False, under="probe and k-NN"
    )
    knn_temperature: float = option(
        0.07, "k-NN: votes are exp(similarity / temperature).", above=0, affects_result=False, under="probe and k-NN"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task == "linear_probe" and self.max_grad_norm is not None:
            raise RecipeError("max_grad_norm would let one head of the probe slow down the others: leave it out")
