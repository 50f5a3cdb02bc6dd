"""`DownstreamTrainer` for classifiers, whose evaluation keeps the best classes and the loss of each image.

Shapes: B images in a batch, n in a set, K classes. A model with several heads has logits (B, heads, K).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainingArguments

from ...data.batches.classification import IGNORED_LABEL
from ...evaluation.metrics import ranked_classes
from .base import DownstreamTrainer

# metrics by name, the ranked classes (n, 5) that they are of, and the labels (n,)
Tested = tuple[dict[str, float], np.ndarray, np.ndarray]


class ClassificationTrainer(DownstreamTrainer):
    """A `DownstreamTrainer` whose batches are dicts of `pixel_values` (B, C, H, W) and `labels`.

    Labels are int64 (B,), or in training also soft (B, K). Evaluation loaders must give all processes equally many
    batches of one size, padded with images of label -100: those count nowhere.

    Args:
        model, args, options: see `DownstreamTrainer`.
        compute_metrics: of an `EvalPrediction` with `predictions` (n, 5), the classes of each image, best first (fewer
            where there are fewer classes; (n, heads, 5) with several heads), and `label_ids` (n,); padding is gone.
    """

    compute_metrics: Callable[[EvalPrediction], dict[str, float]]

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        **options: Any,
    ):
        super().__init__(
            model,
            args,
            compute_metrics=exact_metrics(compute_metrics or (lambda prediction: {})),
            preprocess_logits_for_metrics=rank_classes,
            **options,
        )

    def test(self, loader: DataLoader[Any]) -> Tested:
        """Evaluates on other images, and returns the predictions, too. Collective.

        Returns:
            `loss` and the metrics by their plain names, the ranked classes (n, 5) that they are of, and the labels
            (n,), int64; all on every process, without the padding.
        """
        output: Any = self.evaluation_loop(loader, description="Test")
        classes, _ = output.predictions
        is_image = output.label_ids != IGNORED_LABEL
        metrics = self.compute_metrics(EvalPrediction(output.predictions, output.label_ids))
        return metrics, classes[is_image], output.label_ids[is_image]


def rank_classes(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What evaluation keeps of a batch's logits (B, …, K), where … is nothing or heads.

    Returns:
        The best classes in order, int64 (B, …, 5), and the cross-entropy of each image, float32 (B, …).
    """
    targets = labels.clamp(min=0).view(-1, *[1] * (logits.ndim - 1)).expand(*logits.shape[:-1], 1)
    return ranked_classes(logits), -logits.float().log_softmax(dim=-1).gather(-1, targets).squeeze(-1)


def exact_metrics(
    compute_metrics: Callable[[EvalPrediction], dict[str, float]],
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Metrics over the images that are not padding, and their mean loss, from what `rank_classes` kept.

    It replaces Trainer's own loss, a mean over batches in which the padded last one weighs as much as any.
    """

    def compute(prediction: Any) -> dict[str, float]:
        classes, losses = prediction.predictions
        is_image = prediction.label_ids != IGNORED_LABEL
        loss = losses[is_image].mean(axis=0).sum()  # over images; over heads
        real = EvalPrediction(predictions=classes[is_image], label_ids=prediction.label_ids[is_image])
        return {"loss": float(loss), **compute_metrics(real)}

    return compute
