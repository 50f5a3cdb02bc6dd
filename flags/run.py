"""The flags that every training has."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from .option import CheckedArguments, option


@dataclass
class RunArguments(CheckedArguments):
    """What every training has: its folder, its batches, the machine, and how often something is kept or shown."""

    output_dir: str | None = option(
        None, "Where everything goes; default: in outputs/, by the recipe, numbered if taken."
    )
    overwrite_output_dir: bool = option(False, "Delete the run that output_dir holds.")
    resume_from_checkpoint: str | None = option(None, "latest (the newest valid one in output_dir), or a path.")
    seed: int = option(0, "Initialisation, order of samples and everything drawn at random follow from it.")

    per_device_train_batch_size: int = option(64, "Images per process and forward pass.")
    gradient_accumulation_steps: int = option(1, "Forward passes per optimiser step.")
    max_train_steps: int | None = option(None, "Optimiser steps; wins over num_train_epochs.")
    warmup_learning_rate: float = option(0.0, "Where the warm-up starts.")
    weight_decay: float = option(0.05, "On parameters with more than one dimension that are not biases.")
    max_grad_norm: float | None = option(None, "Clip gradients at this norm; pre-training, the approximator's apart.")

    image_mean: list[float] | None = option(
        None, "Per channel, in 0..1; default: the checkpoint's, else ImageNet's for 3 channels, else 0.5."
    )
    image_std: list[float] | None = option(
        None, "Per channel, in 0..1; default: the checkpoint's, else ImageNet's for 3 channels, else 0.5."
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "Default: accelerate's.")
    torch_compile: bool = option(False, "Compile the model; pays on a GPU.")
    use_cpu: bool = option(False, "Train on the CPU even if there is a GPU.")
    cpu_threads: int | None = option(
        None, "On a CPU, threads of all processes of a machine together; default: torch's, which accelerate sets to 1."
    )

    checkpointing_steps: int | None = option(None, "Save every so many steps; wins over checkpointing_epochs.")
    checkpointing_epochs: float = option(1.0, "Save every so many epochs.")
    checkpoints_total_limit: int | None = option(3, "Keep the newest so many; at least 2.")
    logging_steps: int = option(10, "Log every so many steps.")
    evaluation_steps: int | None = option(None, "Evaluate every so many steps; wins over evaluation_epochs.")
    evaluation_epochs: float = option(10.0, "Evaluate every so many epochs.")
    report_to: str = option("tensorboard", "Any Accelerate tracker, several with commas, or none.")

    def __post_init__(self):
        super().__post_init__()
        self._check("at least 2", lambda value: value >= 2, "checkpoints_total_limit")

    AT_LEAST_1: ClassVar = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "logging_steps",
        "max_train_steps",
        "checkpointing_steps",
        "evaluation_steps",
        "cpu_threads",
    )
    POSITIVE: ClassVar = ("checkpointing_epochs", "evaluation_epochs", "max_grad_norm")
    NOT_NEGATIVE: ClassVar = ("weight_decay", "warmup_learning_rate")


@dataclass
class CropArguments(RunArguments):
    """What every script has that tests on whole images of one size."""

    evaluation_crop_ratio: float = option(0.875, "Images are tested resized to size / ratio and cropped; 1: whole.")

    FRACTIONS: ClassVar = (*RunArguments.FRACTIONS, "evaluation_crop_ratio")
