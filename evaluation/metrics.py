"""Metrics as local `evaluate.Metric` classes: `evaluate.load` needs a network, these do not.

They compute in memory: no cache file, no lock, no folder is made. In a run of several processes each computes on what
was gathered, and all get the same values.

Shapes: n images, K classes, k ranked classes.
"""

import evaluate
import numpy as np
import torch
from datasets import Features, Sequence, Value

from ..data.batches.classification import IGNORED_LABEL

TOP = 5


def ranked_classes(logits: torch.Tensor) -> torch.Tensor:
    """The classes of the five largest logits, best first: (n, K) → int64 (n, min(5, K))."""
    return logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices


class InMemoryMetric(evaluate.Metric):
    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _build_data_dir(self) -> str:
        # The library would make an empty folder in the user's cache, needed only where data spill to disk.
        return self._data_dir_root


class TopKAccuracy(InMemoryMetric):
    """Top-1 and top-5 accuracy of ranked classes.

    `compute(predictions=..., references=...)` takes
        predictions: integers (n, k), class indices, best first, as `ranked_classes` gives them. With k < 5, as where
            there are fewer than five classes, the top five are the k there are.
        references: integers (n,), class indices; −100 is padding and left out.

    It returns `accuracy` and `top5_accuracy`, fractions in [0, 1]. ValueError: no image is left to count, or the
    shapes do not belong together.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-1 and top-5 accuracy of ranked classes.",
            citation="",
            inputs_description="predictions: class indices (n, k), best first; references: class indices (n,)",
            features=Features({"predictions": Sequence(Value("int64")), "references": Value("int64")}),
        )

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        labels = np.asarray(references)
        if not (labels != IGNORED_LABEL).any():
            raise ValueError(f"no image to count: there are {len(labels)} references, all of them {IGNORED_LABEL}")
        ranked = np.asarray(predictions)[:, :TOP]  # (n, k)
        hits = (ranked == labels[:, None])[labels != IGNORED_LABEL]
        return {"accuracy": float(hits[:, 0].mean()), f"top{TOP}_accuracy": float(hits.any(1).mean())}
