"""The course of a run, drawn from its `metrics.jsonl`."""

import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..modeling_mim import LossTerm
from ..training.jsonl import read_jsonl
from .classes import DPI, save_figure

logger = logging.getLogger(__name__)

# Title of a panel, and the metrics it draws with their names in its legend.
Panels = tuple[tuple[str, dict[str, str]], ...]


def pretraining_panels(loss_terms: Mapping[str, LossTerm]) -> Panels:
    """A panel for each loss term that has a meaning, then the learning rate and the probes."""
    terms = [(name, term) for name, term in loss_terms.items() if term.meaning]
    # L_max with its index lowered
    symbols = {name: re.sub("_(.+)", r"_\\mathrm{\1}", term.symbol) for name, term in terms}
    return (
        *((f"{term.meaning}, ${symbols[name]}$", {name: ""}) for name, term in terms),
        ("Learning rate", {"learning_rate": ""}),
        ("Accuracy on frozen features", {"knn_accuracy": "k-NN", "linear_accuracy": "linear"}),
    )


CLASSIFICATION_PANELS: Panels = (
    ("Loss, of training with its mixing and smoothing", {"loss": "training", "eval_loss": "held out"}),
    ("Accuracy on held-out images", {"eval_accuracy": "top 1", "eval_top5_accuracy": "top 5"}),
    ("Learning rate", {"learning_rate": ""}),
)
SEGMENTATION_PANELS: Panels = (
    ("Loss, of both heads", {"loss": ""}),
    ("On held-out images", {"eval_mean_iou": "mIoU", "eval_mean_accuracy": "mAcc", "eval_overall_accuracy": "aAcc"}),
    ("Learning rate", {"learning_rate": ""}),
)
DETECTION_PANELS: Panels = (
    ("Loss", {"loss": ""}),
    (
        "Parts of the loss",
        {
            "rpn_objectness_loss": "proposals: object",
            "rpn_box_loss": "proposals: box",
            "box_class_loss": "class",
            "box_regression_loss": "box",
            "mask_loss": "mask",
        },
    ),
    ("Average precision on held-out images", {"eval_box_ap": "box", "eval_mask_ap": "mask"}),
    ("Learning rate", {"learning_rate": ""}),
)
COLORS = ("#2f5d8a", "#c8702a", "#4c8c4a", "#8a5a9e", "#7a7a2e")
FAINT = "#8a8a8a"

Series = dict[str, dict[int, float]]


def save_curves(
    metrics_path: str | os.PathLike[str],
    picture_path: str | os.PathLike[str],
    *,
    panels: Panels,
    gate_threshold: float | None = None,
) -> None:
    """Draw losses, learning rate and accuracies over the steps of a run as a PNG; what was not logged is left out.

    With `gate_threshold`, the threshold of L_rec is drawn in, and the first logged step at which the gate was open.
    A step logged twice, by a run that was resumed, counts as it was logged last.

    Args:
        metrics_path: one JSON object a line, with `step` and any metrics.
        picture_path: where the PNG goes, whole or not at all; not if nothing was logged that could be drawn.
        panels: which metrics are drawn, and where.
        gate_threshold: the value of L_rec below which the information terms begin to train.
    """
    series = _read_series(Path(metrics_path))
    drawn = [(title, names) for title, names in panels if series.keys() & names.keys()]
    if not drawn:
        logger.warning("%s holds no metric to draw, so there is no %s", metrics_path, Path(picture_path).name)
        return
    gate = {} if gate_threshold is None else series.get("mi_active", {})
    gate_step = min((step for step, is_open in gate.items() if is_open), default=None)

    num_columns = min(3, len(drawn))
    num_rows = math.ceil(len(drawn) / num_columns)
    figure = Figure(figsize=(4.2 * num_columns, 2.9 * num_rows), layout="constrained", facecolor="white")
    for index, (title, names) in enumerate(drawn, start=1):
        axes = figure.add_subplot(num_rows, num_columns, index)
        _draw_panel(axes, title, names, series)
        if "reconstruction_loss" in names and gate_threshold is not None:
            axes.axhline(gate_threshold, color=FAINT, linestyle=":", label=f"gate opens below {gate_threshold:g}")
        if gate_step is not None:
            label = f"open at step {gate_step:,}" if "reconstruction_loss" in names else None
            axes.axvline(gate_step, color=FAINT, linewidth=0.8, label=label)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    save_figure(figure, picture_path, DPI)


def _read_series(path: Path) -> Series:
    series: Series = {}
    for metrics in read_jsonl(path):
        step = metrics.pop("step", None)
        for name, value in metrics.items() if step is not None else ():
            series.setdefault(name, {})[step] = value
    return series


def _draw_panel(axes: Axes, title: str, names: dict[str, str], series: Series) -> None:
    for color, (name, label) in zip(COLORS, names.items(), strict=False):
        points = sorted(series.get(name, {}).items())
        # A few points are a probe now and then: show where they lie.
        marker = "o" if len(points) <= 30 else ""
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=3, label=label or None)
    if "mi_min_loss" in names:
        axes.axhline(0, color=FAINT, linewidth=0.5)
    if "knn_accuracy" in names:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    if "learning_rate" in names:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}" if value else "0")
    axes.set_xlim(0, 1.02 * max(1, *(step for points in series.values() for step in points)))
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.set_xlabel("step", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
