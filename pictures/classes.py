"""Pictures of classes: confusion matrices, and maps of features.

Shapes: n images, D features, K classes.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import confusion_matrix

INK = "#1a1a1a"
BLUES = LinearSegmentedColormap.from_list("blues", ["#ffffff", "#8fb4d6", "#2f5d8a", "#16324f"])
# the most classes that colours tell apart: ten dark ones, then their light counterparts
CLASS_COLORS = [colormaps["tab20"](index) for index in (*range(0, 20, 2), *range(1, 20, 2))]
DPI = 150

MOST_CLASSES = 1000  # of a confusion matrix: with more, each has less than a pixel
MOST_NAMES = 40  # beside it
MOST_NUMBERS = 20  # in a row of its cells
LONGEST_NAME = 24  # letters; longer ones are cut short

MOST_POINTS = 2000  # of a map of features: more would hide each other, and t-SNE takes long for them
FEWEST_FOR_TSNE = 50  # it balances about 30 neighbours of each point against the rest


def save_confusion_matrix(
    labels: np.ndarray, predictions: np.ndarray, label_names: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Draw the confusion matrix, in per cent of each true class, as a PNG that appears whole or not at all.

    With few classes there are names beside the picture and numbers in it, with many there are colours
    only. Colours are spread by the square root, so that rare confusions show.

    Args:
        labels, predictions: class indices (n,).
        label_names: of the K classes, in label order.

    Raises:
        ValueError: no image; labels without a name; more than 1,000 classes.
    """
    num_classes = len(label_names)
    if num_classes > MOST_CLASSES:
        raise ValueError(f"a confusion matrix of {num_classes} classes cannot be read; draw at most {MOST_CLASSES}")
    _check_labels(labels, label_names)
    shares = confusion_matrix(labels, predictions, labels=range(num_classes), normalize="true")  # (K, K)
    has_numbers = num_classes <= MOST_NUMBERS
    side = 3.5 + 0.25 * num_classes if has_numbers else 8.5  # inches
    figure = Figure(figsize=(side, side if has_numbers else 7.8), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap=BLUES, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    accuracy = np.mean(np.asarray(labels) == np.asarray(predictions))
    axes.set_title(f"{100 * accuracy:.1f} % of {len(labels):,} images right", color=INK, size=11, pad=10)
    axes.set_xlabel("predicted, in % of the true class", color=INK, labelpad=8)
    axes.set_ylabel("true", color=INK, labelpad=8)
    _name_ticks(axes, label_names if num_classes <= MOST_NAMES else [])
    if has_numbers:
        _write_cells(axes, shares)
        axes.spines[:].set_visible(False)
    else:
        bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.03, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
        bar.ax.set_yticklabels(["0", "1 %", "10 %", "25 %", "50 %", "100 %"], color=INK, size=9)
        bar.outline.set_visible(False)
        axes.spines[:].set_color("#d0d0d0")
    save_figure(figure, path, DPI)


def save_feature_map(
    features: np.ndarray,
    labels: np.ndarray,
    label_names: Sequence[str],
    path: str | os.PathLike[str],
    *,
    method: Literal["tsne", "pca"] = "tsne",
    seed: int = 0,
) -> None:
    """Draw features in two dimensions, coloured by class, as a PNG that appears whole or not at all.

    At most 2,000 images, drawn at random, are shown. With fewer than 50, t-SNE has too few neighbours to go by and the
    map is that of PCA; its title says which it is.

    Args:
        features: (n, D).
        labels: class indices (n,).
        label_names: of the K classes, in label order; with more than 20 there is no legend.
        method: "tsne" (van der Maaten and Hinton 2008) or "pca".
        seed: of the choice of images and of t-SNE.

    Raises:
        ValueError: fewer than two images or features; labels without a name; no such method.
    """
    if method not in ("tsne", "pca"):
        raise ValueError(f"method is 'tsne' or 'pca', got {method!r}")
    if features.ndim != 2 or min(features.shape) < 2 or len(labels) != len(features):
        raise ValueError(
            f"a map needs features (n, D) of n, D >= 2 and n labels, got {features.shape} and {len(labels)}"
        )
    _check_labels(labels, label_names)
    chosen = np.random.default_rng(seed).permutation(len(features))[:MOST_POINTS]  # no class is drawn over the others
    features, labels = features[chosen], np.asarray(labels)[chosen]
    if method == "pca" or len(features) < FEWEST_FOR_TSNE:
        pca = PCA(n_components=2, random_state=seed)
        points = pca.fit_transform(features)  # (n, 2)
        first, second = (f"{100 * share:.0f} %" for share in pca.explained_variance_ratio_)
        title = f"PCA of {len(features):,} images: {first} and {second} of the variance"
    else:
        points = TSNE(init="pca", random_state=seed).fit_transform(features)
        title = f"t-SNE of {len(features):,} images"
    save_figure(_draw_points(points, labels, label_names, title), path, DPI)


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: float) -> None:
    """Write a figure as a PNG that appears at `path` whole or not at all."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=dpi)
    partial.replace(path)


def _draw_points(points: np.ndarray, labels: np.ndarray, label_names: Sequence[str], title: str) -> Figure:
    num_classes = len(label_names)
    has_legend = num_classes <= len(CLASS_COLORS)
    palette = CLASS_COLORS if has_legend else colormaps["turbo"](np.linspace(0, 1, num_classes))
    figure = Figure(figsize=(7.2 if has_legend else 6, 6), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    size = float(np.clip(30_000 / len(points), 14, 60))  # in square points
    axes.scatter(points[:, 0], points[:, 1], c=[palette[label] for label in labels], s=size, alpha=0.85, linewidths=0)
    axes.set_title(title if has_legend else f"{title}, {num_classes:,} classes", color=INK, size=11, pad=10)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if has_legend:
        for name, color in zip(short_name(label_names), palette, strict=False):
            axes.scatter([], [], color=color, s=36, label=name)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, labelcolor=INK, fontsize=9)
    return figure


def _name_ticks(axes: Axes, names: Sequence[str]) -> None:
    names = short_name(names)
    fit_side_by_side = len(names) * max(map(len, names), default=0) <= 50  # letters, in the width of the picture
    axes.set_xticks(range(len(names)), names, rotation=0 if fit_side_by_side else 90)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)


def short_name(names: Sequence[str]) -> list[str]:
    return [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in names]


def _write_cells(axes: Axes, shares: np.ndarray) -> None:
    for row, column in np.argwhere(shares >= 0.005):  # what rounds to 0 % is left blank
        share = shares[row, column]
        color = "white" if share > 0.3 else INK
        axes.text(column, row, f"{100 * share:.0f}", color=color, size=8.5, ha="center", va="center")


def _check_labels(labels: np.ndarray, label_names: Sequence[str]) -> None:
    if len(labels) == 0:
        raise ValueError("no image to draw: there are no labels")
    unnamed = sorted({int(label) for label in np.unique(labels) if not 0 <= label < len(label_names)})
    if unnamed:
        raise ValueError(f"labels {unnamed[:10]} have no name: there are {len(label_names)} label_names")
