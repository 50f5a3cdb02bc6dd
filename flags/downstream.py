"""The flags of every downstream script: how a model that starts from a checkpoint is trained."""

from dataclasses import dataclass
from typing import ClassVar

from .option import option
from .run import RunArguments


@dataclass
class DownstreamArguments(RunArguments):
    """What training has in common for classes, masks and boxes."""

    untrained: bool = option(
        False, "Take only the architecture of --model_name_or_path, with random weights: the control."
    )
    num_train_epochs: float = option(100.0, "Passes over the training images.")
    evaluation_epochs: float = option(1.0, "Evaluate every so many epochs.")
    layer_decay: float = option(0.75, "Fine-tuning: the learning rate of each block, over that of the next.")
    adam_beta1: float = option(0.9, "Fine-tuning: AdamW.")
    adam_beta2: float = option(0.999, "Fine-tuning: AdamW.")

    POSITIVE: ClassVar = (*RunArguments.POSITIVE, "num_train_epochs")
    FRACTIONS: ClassVar = (*RunArguments.FRACTIONS, "layer_decay")
