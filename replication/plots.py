"""Curves over budgets, differences with their intervals, and the course of the losses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure

from mimae.pictures.classes import save_figure

from .intervals import Interval
from .plan import ARMS
from .results import Results

DPI = 110
RECONSTRUCTION = "reconstruction_loss"
LOSSES = {RECONSTRUCTION: "L_rec", "mi_max_loss": "L_max", "mi_min_loss": "L_min"}


def save_budgets(path: Path, results: Results, metrics: Mapping[str, str]) -> None:
    """Accuracy over masked views: a line for each arm, bars of one standard deviation; random weights are a level.

    Args:
        metrics: which, with their names; a panel each.
    """
    shown = [metric for metric in metrics if any(metric in found for found in results.metrics.values())]
    figure = Figure(figsize=(3.2 * len(shown), 3.2), layout="constrained")
    for place, metric in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), place + 1)
        for name in dict.fromkeys(name for name, _ in results.metrics):
            points = [(s, f[metric]) for (n, s), f in results.metrics.items() if n == name and metric in f]
            means = [fmean(values.values()) for _, values in points]
            if not ARMS[name].is_trained:
                axes.axhline(means[0], color="gray", linestyle=":", label=ARMS[name].words)
                continue
            views = [steps * results.scale.views_per_step for steps, _ in points]
            deviations = [stdev(values.values()) if len(values) > 1 else 0.0 for _, values in points]
            axes.errorbar(views, means, deviations, marker="o", markersize=3, capsize=2, label=ARMS[name].words)
        axes.set(title=metrics[metric], xlabel="masked views", xscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def save_differences(
    path: Path, differences: Sequence[tuple[str, Mapping[str, Interval]]], metrics: Mapping[str, str]
) -> None:
    """Differences of pairs of arms as bars with their intervals, a panel for each metric.

    Args:
        differences: the name of a comparison, and by metric its difference.
    """
    shown = [metric for metric in metrics if any(metric in found for _, found in differences)]
    figure = Figure(figsize=(2.4 + 2.4 * len(shown), 0.9 + 0.32 * len(differences)), layout="constrained")
    for place, metric in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), place + 1)
        known = [(row, found[metric]) for row, (_, found) in enumerate(differences) if metric in found]
        rows, means = [row for row, _ in known], [each.mean for _, each in known]
        reach = [each.half_width if each.n > 1 else 0.0 for _, each in known]
        axes.barh(rows, means, xerr=reach, height=0.6, capsize=2, color="#9db7d1", ecolor="#2f5d8a")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(title=metrics[metric], xlabel="points", ylim=(len(differences) - 0.5, -0.5))
        axes.set_yticks(range(len(differences)), [name for name, _ in differences] if place == 0 else [])
    _save(figure, path)


def save_losses(path: Path, series: Mapping[str, Mapping[str, Sequence[float]]], threshold: float | None) -> None:
    """The terms over the steps of one seed, by arm; the gate's threshold is drawn in (the paper's Fig. 3)."""
    figure = Figure(figsize=(3.6 * len(LOSSES), 3.0), layout="constrained")
    for place, (name, words) in enumerate(LOSSES.items()):
        axes = figure.add_subplot(1, len(LOSSES), place + 1)
        for number, (arm, values) in enumerate(series.items()):
            if name == RECONSTRUCTION or ARMS[arm].has_information_terms:
                axes.plot(values["step"], values[name], f"C{number}", linewidth=1, label=ARMS[arm].words)
        axes.set(title=words, xlabel="step")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylim(top=1)  # the loss of predicting each patch's mean, since patches are normalised
    if threshold is not None:
        figure.axes[0].axhline(threshold, color="gray", linestyle="--", linewidth=0.8)
        figure.axes[0].annotate("ε_l", (1.01, threshold), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, DPI)
