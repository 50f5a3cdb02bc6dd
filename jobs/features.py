"""Features of a frozen encoder, extracted by all processes together.

Shapes: n images, D features.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from ..data.batches.loaders import evaluation_batches
from ..data.sources.opening import ImageSource
from ..evaluation.features import Encoder, extract_features
from ..training.processes import everywhere, together


def gather_features(
    model: Encoder,
    source: ImageSource,
    indices: np.ndarray,
    *,
    normalize: Callable[[torch.Tensor], torch.Tensor],
    read: dict[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
    """`extract_features` of a source's images; each process extracts its share, and all get all. Collective.

    Args:
        model: on this process's device.
        indices: which images (n,).
        normalize: uint8 pixels to what the model was trained on.
        read: how images are read: keyword arguments of `evaluation_batches`.

    Returns:
        Features (n, D) and labels (n,), without the images that have no label or cannot be decoded; of several
        processes in another order than `indices`.
    """
    state = PartialState()
    share = indices[state.process_index :: state.num_processes]

    def extract() -> list[tuple[np.ndarray, np.ndarray]]:
        if not len(share):  # there may be more processes than images
            return []
        batches = evaluation_batches(source, indices=share, **read)
        return [extract_features(model, batches, normalize=normalize, device=state.device)]

    parts = everywhere(together(extract))
    features, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return features[labels >= 0], labels[labels >= 0]  # -1: an image without a label
