"""Semantic segmentation: predictions by a sliding window, and their metrics.

Shapes: B images, C channels, K classes, h, w height and width of what the model sees, H, W those of the original.
"""

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from datasets import Features, Sequence, Value

from .metrics import InMemoryMetric

Predict = Callable[[torch.Tensor], torch.Tensor]


class MeanIoU(InMemoryMetric):
    """Intersection over union, and accuracy, of label maps (H, W) of any sizes; `compute` counts pixels, not images.

    What `add`, `add_batch` and `compute(predictions=..., references=...)` take is counted at once and not kept: the
    label maps of a whole data set would not fit into memory. In a run of several processes sum `confusion_matrix`
    before `compute`:

        metric.confusion_matrix = accelerator.reduce(metric.confusion_matrix.to(accelerator.device), "sum").cpu()

    `compute` returns, as fractions in [0, 1], and starts over:
        mean_iou: over the classes that occur in truth or prediction.
        mean_accuracy: share of a class's pixels that are right, over the classes that occur in the truth.
        overall_accuracy: share of all pixels that are right.
        per_class_iou: list of K; None for a class that does not occur.
    These are mmsegmentation's mIoU, mAcc, aAcc and IoU (mmseg/evaluation/metrics/iou_metric.py).

    Args:
        num_classes: K.
        ignore_index: of pixels of the truth that do not count.

    Attributes:
        confusion_matrix: int64 (K, K), pixels of a true class (row) that were predicted as a class (column).
    """

    def __init__(self, num_classes: int, ignore_index: int = 255):
        super().__init__()
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.confusion_matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def _info(self) -> evaluate.MetricInfo:
        label_map = Sequence(Sequence(Value("int64")))
        return evaluate.MetricInfo(
            description="Mean intersection over union, mean and overall accuracy of semantic segmentation.",
            citation="",
            inputs_description="predictions, references: label maps (H, W)",
            features=Features({"predictions": label_map, "references": label_map}),
        )

    def add(self, *, prediction: torch.Tensor | np.ndarray, reference: torch.Tensor | np.ndarray) -> None:
        """Counts a label map, integers (H, W), against the truth.

        Raises:
            ValueError: the shapes differ; a class that is none of the K.
        """
        prediction, reference = (torch.as_tensor(labels).to(torch.int64) for labels in (prediction, reference))
        if prediction.shape != reference.shape:
            raise ValueError(f"a prediction of {tuple(prediction.shape)} for a truth of {tuple(reference.shape)}")
        counted = reference != self.ignore_index
        pairs = torch.stack([reference[counted], prediction[counted]])  # (2, pixels)
        if pairs.numel() and not 0 <= pairs.min() <= pairs.max() < self.num_classes:
            raise ValueError(
                f"there are {self.num_classes} classes, but labels of {pairs.min()} to {pairs.max()}: correct "
                "num_classes, or mark pixels without a class by ignore_index"
            )
        counts = torch.bincount(self.num_classes * pairs[0] + pairs[1], minlength=self.num_classes**2)  # (K²,)
        self.confusion_matrix += counts.view_as(self.confusion_matrix).cpu()

    def add_batch(self, *, predictions: Iterable[Any], references: Iterable[Any]) -> None:
        """Counts label maps as `add` does, one after another."""
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def compute(
        self, *, predictions: Iterable[Any] = (), references: Iterable[Any] = ()
    ) -> dict[str, float | list[float | None]]:
        """Counts what is given, and returns the metrics of everything counted since the last call.

        Raises:
            ValueError: no pixel was counted.
        """
        self.add_batch(predictions=predictions, references=references)
        counts = self.confusion_matrix.numpy()
        self.confusion_matrix = torch.zeros_like(self.confusion_matrix)
        if not counts.any():
            raise ValueError("no pixel to count: no label map was added, or all their pixels are ignored")
        right, true, predicted = np.diag(counts), counts.sum(1), counts.sum(0)  # (K,) each
        union = true + predicted - right
        ious = [float(hits / area) if area else None for hits, area in zip(right, union, strict=True)]
        return {
            "mean_iou": float(np.mean([iou for iou in ious if iou is not None])),
            "mean_accuracy": float(np.mean(right[true > 0] / true[true > 0])),
            "overall_accuracy": float(right.sum() / true.sum()),
            "per_class_iou": ious,
        }


def sliding_window_logits(
    predict: Predict, pixel_values: torch.Tensor, *, crop_size: int, stride: int, num_classes: int
) -> torch.Tensor:
    """Logits of images of any size from a model of one size: windows at a stride, averaged where they overlap.

    As mmsegmentation's `slide_inference`: the last windows are shifted back inside the image, and an image smaller
    than a window is padded with zeros at the right and at the bottom. One window of all B images is predicted at a
    time.

    Args:
        predict: (B, C, S, S) → logits (B, K, S, S), S the crop size.
        pixel_values: (B, C, h, w), normalised.
        crop_size: side of a window, pixels.
        stride: pixels from a window to the next.
        num_classes: K.

    Returns:
        float32 (B, K, h, w), on the device of `pixel_values`.

    Raises:
        ValueError: a stride that would leave gaps; logits of another shape.
    """
    if not 0 < stride <= crop_size:
        raise ValueError(f"a stride of {stride} leaves gaps between windows of {crop_size}: take 1 to {crop_size}")
    batch_size, _, height, width = pixel_values.shape
    padding = (0, max(0, crop_size - width), 0, max(0, crop_size - height))
    padded = F.pad(pixel_values, padding)  # (B, C, at least S, at least S)
    total = padded.new_zeros(batch_size, num_classes, *padded.shape[2:], dtype=torch.float32)
    count = padded.new_zeros(padded.shape[2:], dtype=torch.float32)
    # at the stride, the last one as far back as it must be to fit
    tops, lefts = ([*range(0, side - crop_size, stride), side - crop_size] for side in padded.shape[2:])
    for top, left in product(tops, lefts):
        window = (..., slice(top, top + crop_size), slice(left, left + crop_size))
        logits = predict(padded[window])
        if logits.shape != total[window].shape:
            raise ValueError(f"logits of {tuple(logits.shape)}, expected {tuple(total[window].shape)}")
        total[window] += logits
        count[window] += 1
    return (total / count)[..., :height, :width]


def segment(
    predict: Predict, pixel_values: torch.Tensor, original_size: tuple[int, int], **windows: int
) -> torch.Tensor:
    """The class of each pixel of an image, at its original size; logits are resized bilinearly, then compared.

    Args:
        predict, windows: as in `sliding_window_logits`.
        pixel_values: (C, h, w), normalised.
        original_size: (H, W), pixels.

    Returns:
        class indices, int64 (H, W), on the device of `pixel_values`.
    """
    logits = sliding_window_logits(predict, pixel_values[None], **windows)  # (1, K, h, w)
    resized = F.interpolate(logits, size=tuple(original_size), mode="bilinear", align_corners=False)
    return resized[0].argmax(0)  # (1, K, H, W) → (H, W)
