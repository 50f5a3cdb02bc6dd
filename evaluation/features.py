"""Features of a frozen encoder.

Shapes: n images, B of them in a batch, C channels, H × W pixels, D encoder width.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, Self

import numpy as np
import torch


class Encoder(Protocol):
    """A module that makes features of images: what evaluation asks of a model."""

    def encode(self, pixel_values: torch.Tensor) -> Any:
        """(B, C, H, W) → an output with `pooler_output` (B, D) and `feature_map` (B, D, h, w)."""

    def modules(self) -> Iterator[torch.nn.Module]: ...

    def eval(self) -> Self: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...


def extract_features(
    model: Encoder,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    normalize: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device | str,
) -> tuple[np.ndarray, np.ndarray]:
    """One feature vector an image: `model.encode(...).pooler_output`, in evaluation mode and without gradients.

    Args:
        model: already on `device`. Its mode is restored.
        batches: dicts of `pixel_values` (B, C, H, W), uint8, and `labels` (B,).
        normalize: converts uint8 pixels to the model's input, on `device`.
        device: where the model lies.

    Returns:
        Features (n, D), float32, and labels (n,), int64.

    Raises:
        ValueError: there is no batch.
    """
    features, labels = [], []
    with evaluating(model), torch.inference_mode():
        for batch in batches:
            pixel_values = normalize(batch["pixel_values"].to(device, non_blocking=True))  # (B, C, H, W)
            features.append(model.encode(pixel_values).pooler_output.float().cpu())  # (B, D)
            labels.append(batch["labels"].cpu())
    if not features:
        raise ValueError("no images to extract features from: the batches are empty")
    return torch.cat(features).numpy(), torch.cat(labels).long().numpy()


@contextmanager
def evaluating(model: torch.nn.Module | Encoder) -> Iterator[None]:
    """Puts a model into evaluation mode, and each of its modules back into its own mode afterwards."""
    # Module by module: a training model may hold parts that are frozen in evaluation mode, and they stay so.
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
