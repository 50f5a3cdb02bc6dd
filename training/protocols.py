"""What trainings ask of a model, whoever wrote it."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ..modeling_mim import LossTerm


class OptimizedModel(Protocol):
    """What an optimiser asks of a module."""

    def no_weight_decay(self) -> Collection[str]:
        """Names of parameters that do not decay, besides vectors and biases."""

    # of nn.Module
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


class LayeredEncoder(Protocol):
    """What layer decay asks of an encoder."""

    def modules_by_depth(self) -> list[nn.Module]:
        """The embeddings, then the blocks; what is in none of them learns as fast as the head."""


class LayeredModel(OptimizedModel, Protocol):
    """What layer decay asks of a model."""

    @property
    def base_model(self) -> LayeredEncoder:
        """The encoder."""


class PretrainingConfig(Protocol):
    """Of a model that is pre-trained."""

    @property
    def num_views(self) -> int:
        """Masked views of each image in a forward pass."""


class PretrainingModel(OptimizedModel, Protocol):
    """What a `Pretrainer` asks of a model.

    Its output is a mapping with `loss`, for the one backward, and all that `scalars` names.

    Parameters whose names begin with "approximator." have their gradient's norm clipped apart from the others'.
    """

    @property
    def config(self) -> PretrainingConfig:
        """How it is built."""

    @property
    def scalars(self) -> tuple[str, ...]:
        """What of the output is logged, in this order: "mi_active", the gate, the `loss_terms`, and what else."""

    @property
    def loss_terms(self) -> Mapping[str, LossTerm]:
        """What the loss terms are called, by their names in the output."""

    def forward(self, pixel_values: torch.Tensor, *, noise: torch.Tensor, return_logits: bool) -> Mapping[str, Any]:
        """Of normalised images (B, C, H, W), whose masks are cut from `noise`; without logits where none are asked."""

    # of nn.Module
    def train(self, mode: bool = True) -> nn.Module: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def buffers(self) -> Iterator[torch.Tensor]: ...
    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> Any: ...


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
