"""The flags of `run_mim_pretrain.py`, beside those of the model, the data and the Hub."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from .option import RecipeError, option
from .run import CropArguments, RunArguments


@dataclass
class PretrainingArguments(CropArguments):
    """Optimisation (Sec. 5.1 and the official MAE's recipe), and the probe that watches it."""

    num_train_epochs: float = option(200.0, "Passes over the images.")
    base_learning_rate: float = option(1.5e-4, "lr = base_learning_rate * batch / lr_base_batch.")
    lr_batch_unit: Literal["views", "images"] = option("views", "What the batch counts in the lr rule.")
    lr_base_batch: int = option(256, "See base_learning_rate; 256 for MAE, 512 for SimMIM.")
    lr_scheduler_type: Literal["cosine", "multistep"] = option(
        "cosine", "After the warm-up: a half-cosine, or steps down at lr_milestone_epochs."
    )
    min_learning_rate: float = option(0.0, "cosine: where it ends.")
    lr_milestone_epochs: list[float] | None = option(None, "multistep: the learning rate is multiplied by lr_gamma.")
    lr_gamma: float = option(0.1, "multistep: the factor.")
    warmup_epochs: float = option(10.0, "Linear from warmup_learning_rate.")
    warmup_steps: int | None = option(None, "The same in optimiser steps; wins over warmup_epochs.")
    adam_beta1: float = option(0.9, "AdamW.")
    adam_beta2: float = option(0.95, "AdamW.")
    max_nonfinite_steps: int = option(10, "Stop after so many steps in a row without a finite gradient.")
    crop_interpolation: Literal["bicubic", "bilinear"] = option("bicubic", "Of the random crop; SimMIM's is bilinear.")
    probe_samples: int = option(5000, "At most so many images to fit the probe on, and to test it; 0: no probe.")

    AT_LEAST_1: ClassVar = (*RunArguments.AT_LEAST_1, "lr_base_batch", "max_nonfinite_steps")
    POSITIVE: ClassVar = (*RunArguments.POSITIVE, "num_train_epochs", "base_learning_rate", "lr_gamma")
    NOT_NEGATIVE: ClassVar = (
        *RunArguments.NOT_NEGATIVE,
        "warmup_epochs",
        "warmup_steps",
        "probe_samples",
        "min_learning_rate",
    )

    def __post_init__(self):
        super().__post_init__()
        is_multistep = self.lr_scheduler_type == "multistep"
        if is_multistep != bool(self.lr_milestone_epochs):
            raise RecipeError(
                f"lr_scheduler_type={self.lr_scheduler_type!r} with lr_milestone_epochs={self.lr_milestone_epochs}: "
                "multistep needs milestones, and cosine has none"
            )
        self._check("positive numbers", lambda epochs: min(epochs) > 0, "lr_milestone_epochs")
        if is_multistep and self.min_learning_rate:
            raise RecipeError(f"min_learning_rate={self.min_learning_rate} is for cosine: leave it out")
