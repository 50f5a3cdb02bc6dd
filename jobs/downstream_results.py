"""The results of a finished downstream run: `results.json`, pictures, a card, a few lines."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.robustness import corruption_markdown
from ..hub.model_card import write_classification_card, write_dense_card
from ..pictures.classes import MOST_CLASSES, save_confusion_matrix, save_feature_map
from ..pictures.curves import CLASSIFICATION_PANELS, DETECTION_PANELS, SEGMENTATION_PANELS, save_curves
from ..training.metrics import METRICS_FILE
from .results import RESULTS_FILE, framed, write_record

PANELS = {"segmentation": SEGMENTATION_PANELS, "detection": DETECTION_PANELS}
CURVES = "curves.png"
CORRUPTION_TABLES = ("imagenet_c", "corruptions")


def write_classification_results(
    output_dir: Path,
    *,
    facts: Mapping[str, Any],
    test_images: int,
    metrics: Mapping[str, float],
    label_names: Sequence[str],
    robustness: Mapping[str, Any] | None = None,
    predictions: tuple[np.ndarray, np.ndarray] | None = None,
    features: tuple[np.ndarray, np.ndarray] | None = None,
) -> str:
    """Writes `results.json` and pictures, and a card where the run has left a model.

    Args:
        facts: `task`, `seed`, `recipe` (every flag's value), `hardware`, and what else is to be recorded.
        test_images: number of images that the metrics are of, without those that cannot be decoded.
        metrics: on the held-out images; accuracies as fractions.
        label_names: of the classes.
        robustness: metrics of further sets, and corruption tables.
        predictions: labels (n,) and classes (n,), for the confusion matrix.
        features: features (m, D) and labels (m,), for their map.

    Returns:
        The results in words.
    """
    robustness = robustness or {}
    results = write_record(
        output_dir, {**facts, "test_images": test_images, "metrics": metrics, "robustness": robustness}
    )
    if predictions is not None and len(label_names) <= MOST_CLASSES:
        save_confusion_matrix(*predictions, label_names, output_dir / "confusion_matrix.png")
    if features is not None:
        save_feature_map(*features, label_names, output_dir / "features.png", seed=facts["seed"])
    if (output_dir / METRICS_FILE).exists():
        save_curves(output_dir / METRICS_FILE, output_dir / CURVES, panels=CLASSIFICATION_PANELS)
    rows = [f"{results['task']} of {results['model']} on {results['dataset']}", *_figures(metrics)]
    for name, found in robustness.items():
        if name in CORRUPTION_TABLES:
            rows += ["", name, *corruption_markdown(found).splitlines(), ""]
        else:
            rows += _figures({name: found["accuracy"]})
    write_card = write_classification_card if (output_dir / "config.json").exists() else None
    return _finish(output_dir, results, (CURVES, "confusion_matrix.png", "features.png"), rows, write_card)


def write_dense_results(
    output_dir: Path,
    *,
    facts: Mapping[str, Any],
    test_images: int,
    metrics: Mapping[str, float],
    per_class: Mapping[str, float | None] | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """Writes `results.json`, `curves.png` and the card of the model that lies in the folder.

    Args:
        facts, test_images, metrics: see `write_classification_results`; `task` is "segmentation" or "detection".
        per_class: IoU of each class by its name, None where it is not defined; None if the task has none.
        pictures: PNG files in `output_dir`, which the card shows before the curves.

    Returns:
        The results in words.
    """
    results = {**facts, "test_images": test_images, "metrics": metrics, "per_class": per_class}
    results = write_record(output_dir, results)
    save_curves(output_dir / METRICS_FILE, output_dir / CURVES, panels=PANELS[facts["task"]])
    headline = f"{results['task']} by {results['model']} on {results['dataset']}, {test_images} held-out images"
    return _finish(output_dir, results, (*pictures, CURVES), [headline, *_figures(metrics)], write_dense_card)


def _figures(metrics: Mapping[str, float]) -> list[str]:
    return [f"{name:24} {value:.4g}" for name, value in metrics.items()]


def _finish(
    output_dir: Path,
    results: Mapping[str, Any],
    pictures: Sequence[str],
    rows: Sequence[str],
    write_card: Callable[..., Path] | None,
) -> str:
    """A card, if there is to be one, with those of the pictures that there are; the rows for the terminal."""
    pictures = [name for name in pictures if (output_dir / name).exists()]
    if write_card is not None:
        write_card(output_dir, results=results, pictures=pictures)
    return framed([*rows, f"results in {output_dir}: {', '.join([RESULTS_FILE, *pictures])}"])
