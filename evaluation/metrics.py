"""Metrics as local `evaluate.Metric` classes: `evaluate.load` needs a network, these do not.

They compute in memory: no cache file, no lock, no folder is made. In a run of several processes each computes on what
was gathered, and all get the same values.

Shapes: n images, K classes, k ranked classes.
"""

from collections import defaultdict
from statistics import mean

import evaluate
import numpy as np
import torch
from datasets import Features, Sequence, Value

from ..data.batches.classification import IGNORED_LABEL
from .robustness import relative_errors

TOP = 5


def ranked_classes(logits: torch.Tensor, k: int = TOP) -> torch.Tensor:
    """The classes of the k largest logits, best first: (n, K) → int64 (n, min(k, K)).

    As a `preprocess_logits_for_metrics` it keeps k numbers per image in memory instead of K.
    """
    return logits.topk(min(k, logits.shape[-1]), dim=-1).indices


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


class MeanCorruptionError(InMemoryMetric):
    """mCE of ImageNet-C: errors relative to AlexNet's, averaged over the 15 corruptions, times 100.

    `compute(errors=..., corruptions=...)` takes
        errors: floats (m,), fractions in [0, 1], the top-1 error of a corruption at a severity. Those of a
            corruption are averaged first; `add(errors=..., corruptions=...)` takes them one by one.
        corruptions: names (m,), of `robustness.CORRUPTIONS`.

    It returns `mce`, in per cent of AlexNet's, and `per_corruption`, the same of each. ValueError: a corruption is
    unknown, missing, or measured at fewer severities than another.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean corruption error on ImageNet-C, relative to AlexNet's.",
            citation="Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261, Sec. 4",
            inputs_description="errors: fractions (m,); corruptions: their names (m,)",
            features=Features({"errors": Value("float64"), "corruptions": Value("string")}),
        )

    def _compute(self, errors: list[float], corruptions: list[str]) -> dict[str, float | dict[str, float]]:
        grouped = defaultdict(list)
        for error, corruption in zip(errors, corruptions, strict=True):
            grouped[corruption].append(error)
        counts = {corruption: len(values) for corruption, values in grouped.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"corruptions were measured at different numbers of severities: {counts}")
        relative = relative_errors({corruption: mean(values) for corruption, values in grouped.items()})
        return {"mce": mean(relative.values()), "per_corruption": relative}
