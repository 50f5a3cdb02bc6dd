"""The results of a finished classification run: `results.json`, pictures, a card, a few lines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.robustness import corruption_markdown
from ..hub.model_card import write_classification_card
from ..pictures.classes import MOST_CLASSES, save_confusion_matrix, save_feature_map
from ..pictures.curves import CLASSIFICATION_PANELS, save_curves
from ..training.metrics import METRICS_FILE
from .results import RESULTS_FILE, framed, write_record

PICTURES = ("curves.png", "confusion_matrix.png", "features.png")
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
    results = write_record(
        output_dir, {**facts, "test_images": test_images, "metrics": metrics, "robustness": robustness or {}}
    )
    if predictions is not None and len(label_names) <= MOST_CLASSES:
        save_confusion_matrix(*predictions, label_names, output_dir / "confusion_matrix.png")
    if features is not None:
        save_feature_map(*features, label_names, output_dir / "features.png", seed=facts["seed"])
    if (output_dir / METRICS_FILE).exists():
        save_curves(output_dir / METRICS_FILE, output_dir / "curves.png", panels=CLASSIFICATION_PANELS)
    pictures = [name for name in PICTURES if (output_dir / name).exists()]
    if (output_dir / "config.json").exists():
        write_classification_card(output_dir, results=results, pictures=pictures)
    return _describe(results, output_dir, pictures)


def _describe(results: Mapping[str, Any], output_dir: Path, pictures: Sequence[str]) -> str:
    """A few lines for the terminal."""
    rows = [f"{results['task']} of {results['model']} on {results['dataset']}"]
    rows += [f"{name:24} {value:.4g}" for name, value in results["metrics"].items()]
    for name, found in results["robustness"].items():
        if name in CORRUPTION_TABLES:
            rows += ["", name, *corruption_markdown(found).splitlines(), ""]
        else:
            rows.append(f"{name:24} {found['accuracy']:.4g}")
    rows.append(f"results in {output_dir}: {', '.join([RESULTS_FILE, *pictures])}")
    return framed(rows)
