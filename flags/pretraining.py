"""The flags of `run_mim_pretrain.py`, beside those of the model, the data and the Hub."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from .option import RecipeError, option
from .run import CropArguments


@dataclass
class PretrainingArguments(CropArguments):
    """Optimisation (Sec. 5.1 and the official MAE's recipe), and the probe that watches it."""

    HEADING: ClassVar = "optimisation"

    num_train_epochs: float = option(200.0, "Passes over the images.", above=0, affects_result="schedule")
    base_learning_rate: float = option(
        1.5e-4, "Peak of the learning rate, times batch / lr_base_batch.", above=0, affects_result="schedule"
    )
    lr_batch_unit: Literal["views", "images"] = option(
        "views", "What the batch counts in base_learning_rate's rule.", affects_result="schedule"
    )
    lr_base_batch: int = option(
        256, "The batch of base_learning_rate: 256 for MAE, 512 for SimMIM.", at_least=1, affects_result="schedule"
    )
    lr_scheduler_type: Literal["cosine", "multistep"] = option(
        "cosine", "After the warm-up: a half-cosine, or steps down at lr_milestone_epochs.", affects_result="schedule"
    )
    min_learning_rate: float = option(
        0.0, "cosine: the learning rate at the end.", at_least=0, affects_result="schedule"
    )
    lr_milestone_epochs: list[float] | None = option(
        None, "multistep: where the learning rate is multiplied by lr_gamma.", above=0, affects_result="schedule"
    )
    lr_gamma: float = option(0.1, "multistep: the factor.", above=0, affects_result="schedule")
    warmup_epochs: float = option(
        10.0, "Epochs of the linear warm-up from warmup_learning_rate.", at_least=0, affects_result="schedule"
    )
    warmup_steps: int | None = option(
        None, "Optimiser steps of the warm-up; wins over warmup_epochs.", at_least=0, affects_result="schedule"
    )
    adam_beta1: float = option(0.9, "β1 of AdamW.", affects_result=True)
    adam_beta2: float = option(0.95, "β2 of AdamW.", affects_result=True)
    max_nonfinite_steps: int = option(
        10, "Stop after so many steps in a row without a finite gradient.", at_least=1, affects_result=False
    )
    crop_interpolation: Literal["bicubic", "bilinear"] = option(
        "bicubic", "How the random crop is resized; SimMIM's is bilinear.", affects_result=True, under="augmentation"
    )
    probe_samples: int = option(
        5000,
        "At most so many images to fit the linear probe on, and to test it; 0: no probe.",
        at_least=0,
        affects_result=False,
        under="evaluation",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        is_multistep = self.lr_scheduler_type == "multistep"
        if is_multistep != bool(self.lr_milestone_epochs):
            raise RecipeError(
                f"lr_scheduler_type={self.lr_scheduler_type!r} with lr_milestone_epochs={self.lr_milestone_epochs}: "
                "multistep needs milestones, and cosine has none"
            )
        if is_multistep and self.min_learning_rate:
            raise RecipeError(f"min_learning_rate={self.min_learning_rate} is for cosine: leave it out")
