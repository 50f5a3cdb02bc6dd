"""The results of a finished segmentation or detection run: `results.json`, curves, a card, a few lines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..hub.model_card import write_dense_card
from ..pictures.curves import DETECTION_PANELS, SEGMENTATION_PANELS, save_curves
from ..training.metrics import METRICS_FILE
from .results import RESULTS_FILE, framed, write_record

PANELS = {"segmentation": SEGMENTATION_PANELS, "detection": DETECTION_PANELS}
CURVES = "curves.png"


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
        facts: `task` ("segmentation" or "detection"), `seed`, `recipe` (every flag's value), `hardware`, and what
            else is to be recorded.
        test_images: number of images that the metrics are of, without those that cannot be decoded.
        metrics: on the held-out images, as fractions.
        per_class: IoU of each class by its name, None where it is not defined; None if the task has none.
        pictures: PNG files in `output_dir`, which the card shows before the curves.

    Returns:
        The results in words.
    """
    results = {**facts, "test_images": test_images, "metrics": metrics, "per_class": per_class}
    results = write_record(output_dir, results)
    save_curves(output_dir / METRICS_FILE, output_dir / CURVES, panels=PANELS[facts["task"]])
    pictures = [name for name in (*pictures, CURVES) if (output_dir / name).exists()]
    write_dense_card(output_dir, results=results, pictures=pictures)
    rows = [f"{results['task']} by {results['model']} on {results['dataset']}, {test_images} held-out images"]
    rows += [f"{name:24} {value:.4g}" for name, value in metrics.items()]
    rows.append(f"results in {output_dir}: {', '.join([RESULTS_FILE, *pictures])}")
    return framed(rows)
