"""Monitors of a training: reconstructions of a few fixed images, and probes of the model's features.

Both see images without augmentation, and change nothing: not the model's mode, not the gate, no random state.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState

from ..data.batches.loaders import evaluation_batches
from ..data.images.transforms import Normalization
from ..data.sources.opening import ImageSource
from ..evaluation.features import Encoder, evaluating, extract_features
from ..evaluation.probes import knn_accuracy, linear_probe_accuracy
from ..modeling_mim import MIMForPreTrainingMixin
from ..pictures.reconstructions import save_reconstructions
from ..training.processes import everywhere, on_main_process, together

logger = logging.getLogger(__name__)

PROBE_BLOCKS = 64  # of a sharded source, read for a probe: a row costs as much as its block


class ReconstructionMonitor:
    """Draws reconstructions of a few images.

    Args:
        pixel_values: (B, C, H, W), uint8.
        noise: (B, *noise_shape), what their masks are cut from, the same each time.
        normalize: uint8 images → what the model takes.
    """

    def __init__(self, pixel_values: torch.Tensor, noise: torch.Tensor, normalize: Normalization):
        self._pixel_values, self._noise, self._normalize = pixel_values, noise, normalize

    @torch.no_grad()
    def draw(self, model: MIMForPreTrainingMixin, accelerator: Accelerator, path: Path) -> None:
        """Writes the picture. Collective: the model may gather its negatives."""
        pixel_values = self._normalize(self._pixel_values.to(accelerator.device))
        with evaluating(model):
            # not model(...): a compiled one would be compiled anew for this batch size
            output = model.forward(pixel_values, noise=self._noise.to(accelerator.device))
        on_main_process(
            lambda: save_reconstructions(
                path,
                pixel_values.float().cpu(),
                output.logits.float().cpu(),
                output.mask.cpu(),
                unit_size=model.config.unit_size,
                norm_pix_loss=model.config.norm_pix_loss,
                mean=self._normalize.mean,
                std=self._normalize.std,
            )
        )


class Probe:
    """Accuracy of classifiers on frozen features: k nearest neighbours, and a linear one.

    Args:
        train, test: sources with labels; the classifier is fitted on the first and tested on the second.
        train_indices, test_indices: which of their images.
        read: how images are read: keyword arguments of `evaluation_batches`.
    """

    def __init__(
        self,
        train: ImageSource,
        train_indices: np.ndarray,
        test: ImageSource,
        test_indices: np.ndarray,
        *,
        normalize: Normalization,
        read: dict[str, Any],
    ):
        self._parts = ((train, train_indices), (test, test_indices))
        self._normalize, self._read = normalize, read

    def measure(self, model: Encoder, accelerator: Accelerator) -> dict[str, float]:
        """`knn_accuracy` and `linear_accuracy`, in [0, 1]. Collective: each process extracts its share of features."""
        with accelerator.autocast():
            train, test = (
                gather_features(model, *part, normalize=self._normalize, read=self._read) for part in self._parts
            )
        return on_main_process(lambda: self._accuracies(*train, *test))

    @staticmethod
    def _accuracies(*features: np.ndarray) -> dict[str, float]:
        if len(np.unique(features[1])) < 2:
            logger.warning("no probe: its %d training images are of fewer than two classes", len(features[1]))
            return {}
        return {"knn_accuracy": knn_accuracy(*features), "linear_accuracy": linear_probe_accuracy(*features)}


class Evaluation:
    """All monitors, at one step; pictures go into `folder` as `step-0000500.png`. No probe without labels."""

    def __init__(self, folder: Path, pictures: ReconstructionMonitor, probe: Probe | None):
        self._folder, self._pictures, self._probe = folder, pictures, probe

    def __call__(self, model: MIMForPreTrainingMixin, accelerator: Accelerator, step: int) -> dict[str, float]:
        """Draws, and returns the probe's metrics. Collective."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._pictures.draw(model, accelerator, self._folder / f"step-{step:07d}.png")
        return self._probe.measure(model, accelerator) if self._probe else {}

    @property
    def newest_picture(self) -> Path | None:
        """The one drawn last."""
        return max(self._folder.glob("step-*.png"), default=None)


def probe_indices(source: ImageSource, limit: int) -> np.ndarray:
    """At most `limit` indices of a source, the same in all runs; from few blocks where rows come in blocks."""
    random = np.random.default_rng(0)
    indices = np.arange(len(source))
    if source.reads_blocks:
        ends = np.cumsum(source.block_sizes)
        blocks = random.permutation(len(ends))[:PROBE_BLOCKS]
        indices = np.concatenate([np.arange(ends[b] - source.block_sizes[b], ends[b]) for b in blocks])
    return np.sort(random.permutation(indices)[:limit])


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
