"""Looking at a training while it runs, and disturbing what it is given: what drills and tests do."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from .protocols import PretrainingModel


class TrainingObserver:
    """Told by a `Pretrainer` what it does, as it does it; this one does nothing. Steps are counted from 1."""

    def on_pixels(self, step: int, pixel_values: torch.Tensor) -> torch.Tensor:
        """Before a forward pass: returns what the model is given: (B, C, H, W), normalised, changed or not."""
        return pixel_values

    def on_forward(self, step: int, batch: dict[str, Any], output: Any) -> None:
        """After a forward and a backward pass: the loader's batch, and the model's output."""

    def on_gradients(self, step: int, model: PretrainingModel) -> None:
        """All gradients of a step are there, and the weights are still the old ones."""

    def on_update(self, step: int, model: PretrainingModel) -> None:
        """The weights are the new ones."""

    def on_step(self, step: int) -> None:
        """A step is whole and counted; nothing is logged, saved or evaluated yet."""

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Around the writing of a checkpoint, on the main process."""
        yield
