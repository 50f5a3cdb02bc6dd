"""An exponential moving average of the weights, kept beside a model that `transformers.Trainer` trains."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoints.files import load_tensors
from ..processes import on_main_process

AVERAGE_FILE = "weight_average.safetensors"


class WeightAverage(TrainerCallback):
    """average ← decay · average + (1 - decay) · weights after each optimiser step, from the weights at the start.

    Checkpoints hold the weights as trained in `model.safetensors`, and their average beside it. When training ends the
    model has the averaged weights: those of the best checkpoint if the Trainer went back to it.

    Raises:
        ValueError: a decay out of (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"the decay of the weight average is {decay}; it must lie strictly between 0 and 1")
        self._average = ModelEmaV3(model, decay=decay)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Updates the average."""
        self._average.update(kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Writes the average into the checkpoint, whole or not at all."""
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        partial = folder / f".{AVERAGE_FILE}.partial"

        def write() -> None:
            save_file(self.state_dict(), partial)
            partial.replace(folder / AVERAGE_FILE)

        on_main_process(write)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Gives the model the averaged weights for good."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.load(state.best_model_checkpoint)
        kwargs["model"].load_state_dict(self.state_dict())

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """A context in which the model has the averaged weights."""
        # Copied, not swapped: an optimiser, a compiled graph and DDP hold on to the tensors themselves.
        trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.state_dict())
        try:
            yield
        finally:
            model.load_state_dict(trained)

    def load(self, checkpoint: str | os.PathLike[str]) -> None:
        """Restores the average that a checkpoint holds.

        Raises:
            ValueError: it holds none.
            CheckpointError: its file cannot be read.
        """
        path = Path(checkpoint) / AVERAGE_FILE
        if not path.exists():
            raise ValueError(
                f"{checkpoint} holds no {AVERAGE_FILE}: its run kept no weight average, or was killed while saving. "
                "Resume from another checkpoint, or without a weight average"
            )
        self._average.module.load_state_dict(load_tensors(path))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The average, by the names of the model's own state dict."""
        return self._average.module.state_dict()
