"""The flags of every downstream script: how a model that starts from a checkpoint is trained."""

from dataclasses import dataclass

from .option import changed, of_schedule, option
from .run import RunArguments


@dataclass
class DownstreamArguments(RunArguments):
    """What training has in common for classes, masks and boxes."""

    untrained: bool = option(
        False, "Take only the architecture of --model_name_or_path: the control.", affects_result=True, under="model"
    )
    num_train_epochs: float = of_schedule(100.0, "Passes over the training images.", above=0)
    evaluation_epochs: float = changed(RunArguments, "evaluation_epochs", default=1.0)
    per_device_train_batch_size: int = changed(RunArguments, "per_device_train_batch_size", affects_result=True)
    layer_decay: float = option(
        0.75, "Fine-tuning: learning rate of a block, over that of the next.", above=0, at_most=1, affects_result=True
    )
    adam_beta1: float = option(0.9, "Fine-tuning: β1 of AdamW.", affects_result=True)
    adam_beta2: float = option(0.999, "Fine-tuning: β2 of AdamW.", affects_result=True)
