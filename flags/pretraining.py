"""The flags of `run_mim_pretrain.py`, beside those of the model, the data and the Hub."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from .option import RecipeError, of_schedule, option
from .run import CropArguments


@dataclass
class PretrainingArguments(CropArguments):
    """Optimisation (Sec. 5.1 and the official MAE's recipe), and the probe that watches it."""

    HEADING: ClassVar = "optimisation"

    num_train_epochs: float = of_schedule(200.0, "Passes over the images.", above=0)
    base_learning_rate: float = of_schedule(1.5e-4, "Peak of the learning rate, times batch / lr_base_batch.", above=0)
    lr_batch_unit: Literal["views", "images"] = of_schedule("views", "What base_learning_rate's rule counts.")
    lr_base_batch: int = of_schedule(256, "The batch of base_learning_rate: 256 for MAE, 512 for SimMIM.", at_least=1)
    lr_scheduler_type: Literal["cosine", "multistep"] = of_schedule(
        "cosine", "After the warm-up: a half-cosine, or steps down at lr_milestone_epochs."
    )
    min_learning_rate: float = of_schedule(0.0, "cosine: the learning rate at the end.", at_least=0)
    lr_milestone_epochs: list[float] | None = of_schedule(None, "multistep: where lr_gamma is applied.", above=0)
    lr_gamma: float = of_schedule(0.1, "multistep: the factor of the learning rate.", above=0)
    warmup_epochs: float = of_schedule(10.0, "Epochs of the linear warm-up from warmup_learning_rate.", at_least=0)
    warmup_steps: int | None = of_schedule(None, "Steps of the warm-up; wins over warmup_epochs.", at_least=0)
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
