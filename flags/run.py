"""The flags that every training has."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from .option import CheckedArguments, of_schedule, option


@dataclass
class RunFolderArguments(CheckedArguments):
    """Where a run is kept, and how often something is kept or shown."""

    HEADING: ClassVar = "run folder"

    output_dir: str | None = option(
        None, "Where everything goes.", unset="outputs/ + the recipe's name, numbered if taken", affects_result=False
    )
    overwrite_output_dir: bool = option(False, "Delete the run that output_dir holds.", affects_result=False)
    resume_from_checkpoint: str | None = option(
        None, "Go on from a checkpoint: latest (the newest whole one in output_dir) or a path.", affects_result=False
    )
    checkpointing_steps: int | None = option(
        None, "Save every so many steps; wins over checkpointing_epochs.", at_least=1, affects_result=False
    )
    checkpointing_epochs: float = option(1.0, "Save every so many epochs.", above=0, affects_result=False)
    checkpoints_total_limit: int | None = option(
        3, "Keep so many of the newest checkpoints; None keeps all.", at_least=2, affects_result=False
    )
    logging_steps: int = option(10, "Log every so many steps.", at_least=1, affects_result=False)
    report_to: str = option("tensorboard", "Trackers of Accelerate, with commas, or none.", affects_result=False)


@dataclass
class MachineArguments(CheckedArguments):
    """What of a machine is used, and how."""

    HEADING: ClassVar = "machine"

    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "The type that a model computes in.", unset="accelerate's", affects_result="mixed_precision"
    )
    torch_compile: bool = option(False, "Compile the model; pays on a GPU.", affects_result=False)
    use_cpu: bool = option(False, "Train on the CPU even if there is a GPU.", affects_result=False)
    cpu_threads: int | None = option(
        None,
        "On a CPU, threads of all processes of a machine together.",
        unset="torch's, which accelerate sets to 1",
        at_least=1,
        affects_result=False,
    )


@dataclass
class RunArguments(MachineArguments, RunFolderArguments):
    """What every training has."""

    HEADING: ClassVar = "optimisation"

    seed: int = option(0, "Fixes the initial weights, the order of samples and all random draws.", affects_result=True)
    per_device_train_batch_size: int = option(
        64, "Images per process and forward pass.", at_least=1, affects_result="images_per_forward"
    )
    gradient_accumulation_steps: int = option(1, "Forward passes per optimiser step.", at_least=1, affects_result=True)
    max_train_steps: int | None = of_schedule(None, "Optimiser steps; wins over num_train_epochs.", at_least=1)
    warmup_learning_rate: float = of_schedule(0.0, "Learning rate at the start of the warm-up.", at_least=0)
    weight_decay: float = option(
        0.05, "AdamW: weight decay, of all parameters but biases and vectors.", at_least=0, affects_result=True
    )
    max_grad_norm: float | None = option(
        None, "Clip gradients at this norm; the approximator's apart.", unset="no limit", above=0, affects_result=True
    )
    image_mean: list[float] | None = option(
        None,
        "Mean of the pixels per channel, in 0..1.",
        unset="that of the checkpoint, else ImageNet's for 3 channels, else 0.5",
        affects_result="image_mean",
        under="data",
    )
    image_std: list[float] | None = option(
        None, "Standard deviation per channel.", unset="as image_mean's", affects_result="image_std", under="data"
    )
    evaluation_steps: int | None = option(
        None, "Every so many steps; wins over evaluation_epochs.", at_least=1, affects_result=False, under="evaluation"
    )
    evaluation_epochs: float = option(
        10.0, "Evaluate every so many epochs.", above=0, affects_result=False, under="evaluation"
    )


@dataclass
class CropArguments(RunArguments):
    """What every script has that tests on whole images of one size."""

    HEADING: ClassVar = "evaluation"

    evaluation_crop_ratio: float = option(
        0.875,
        "Test images are resized to the model's size / ratio, and their centre is cropped; 1 keeps all of it.",
        above=0,
        at_most=1,
        affects_result=False,
    )
