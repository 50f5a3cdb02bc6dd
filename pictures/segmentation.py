"""Pictures of predicted segmentations, beside the truth.

Shapes: n images, C channels, H, W height and width of one image, K classes.
"""

import os
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .classes import CLASS_COLORS, DPI, INK, save_figure, short_name

IGNORED = 255
TITLES = ("Image", "Truth", "Predicted")
TILE = 2.1  # inches of an image's width
TALLEST = 1.5  # times its width; taller images are drawn narrower
GAP = 0.06  # inches
TITLE_LINE = 0.32  # inches
LEGEND_LINE = 0.2  # inches
LEGEND_COLUMNS = 4
CLASS_OPACITY = 0.75  # over the image in grey
IGNORED_COLORS = ("#ffffff", "#c4c4c4")
STRIPES = 8  # pairs of them along the shorter side of an ignored image


def save_segmentations(
    images: Sequence[torch.Tensor],
    predictions: Sequence[torch.Tensor],
    references: Sequence[torch.Tensor],
    class_names: Sequence[str],
    path: str | os.PathLike[str],
) -> None:
    """Draw images, truth and predictions beside each other as a PNG that appears whole or not at all.

    Classes are colours over the image in grey, named below if they occur; pixels that are ignored are striped in both
    label maps.

    Args:
        images: n of uint8 (C, H, W), C = 1 or 3; of any sizes.
        predictions: n label maps (H, W).
        references: n label maps (H, W), 255 where a pixel is ignored.
        class_names: of the K classes, in order of their indices.

    Raises:
        ValueError: no image; a label map of another size than its image; a class without a name.
    """
    if not len(images):
        raise ValueError("no image to draw")
    rows = []
    for tensors in zip(images, references, predictions, strict=True):
        image, reference, prediction = map(np.asarray, tensors)
        for labels in (reference, prediction):
            _check_label_map(labels, image.shape[1:], len(class_names))
        rows.append((image, reference, np.where(reference == IGNORED, IGNORED, prediction)))
    occurring = sorted({int(label) for _, *maps in rows for labels in maps for label in np.unique(labels)})
    colors = _class_colors(len(class_names))
    handles = [
        Patch(facecolor=colors[label], label=name)
        for label, name in enumerate(short_name(class_names))
        if label in occurring
    ]
    if IGNORED in occurring:
        white, grey = IGNORED_COLORS
        handles.append(Patch(facecolor=white, edgecolor=grey, hatch="//////", linewidth=0, label="ignored"))
    save_figure(_draw(rows, colors, handles), path, DPI)


def _check_label_map(labels: np.ndarray, size: tuple[int, ...], num_classes: int) -> None:
    if labels.shape != size:
        raise ValueError(f"a label map of {labels.shape} for an image of {size}")
    unnamed = [int(label) for label in np.unique(labels) if label != IGNORED and not 0 <= label < num_classes]
    if unnamed:
        raise ValueError(f"classes {unnamed[:10]} have no name: there are {num_classes} class_names")


def _class_colors(num_classes: int) -> np.ndarray:
    """Colours as distinct as their number allows: float (K, 3)."""
    if num_classes <= len(CLASS_COLORS):
        return np.array([to_rgb(color) for color in CLASS_COLORS[:num_classes]])
    number = np.arange(num_classes)
    hue = number * 0.618034 % 1  # golden ratio: neighbours in the list lie far apart on the colour wheel
    return hsv_to_rgb(np.stack([hue, 0.85 - 0.35 * (number % 2), 0.95 - 0.2 * (number % 3)], axis=1))


def _draw(rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], colors: np.ndarray, handles: list[Patch]) -> Figure:
    """Lay rows of (image, truth, prediction) out below their titles, and the legend below them; all in inches."""
    tiles = [TILE * min(TALLEST, image.shape[1] / image.shape[2]) for image, *_ in rows]
    width = GAP + len(TITLES) * (TILE + GAP)
    height = TITLE_LINE + sum(tiles) + GAP * len(tiles) + LEGEND_LINE * (-(-len(handles) // LEGEND_COLUMNS) + 0.5)
    figure = Figure(figsize=(width, height), facecolor="white")
    top = height - TITLE_LINE
    for (image, reference, prediction), tile in zip(rows, tiles, strict=True):
        pictures = (_rgb(image), _painted(image, reference, colors), _painted(image, prediction, colors))
        for column, pixels in enumerate(pictures):
            left = GAP + column * (TILE + GAP)
            axes = figure.add_axes((left / width, (top - tile) / height, TILE / width, tile / height))
            axes.imshow(pixels, interpolation="nearest")
            axes.set_axis_off()
        top -= tile + GAP
    for column, title in enumerate(TITLES):
        center = GAP + column * (TILE + GAP) + TILE / 2
        figure.text(center / width, 1 - TITLE_LINE / 2 / height, title, color=INK, size=11, ha="center", va="center")
    figure.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, (top + GAP) / height),
        ncols=min(LEGEND_COLUMNS, len(handles)),
        frameon=False,
        labelcolor=INK,
        fontsize=8.5,
        handlelength=1,
        handleheight=1,
    )
    return figure


def _rgb(image: np.ndarray) -> np.ndarray:
    """(1 or 3, H, W) → (H, W, 3)."""
    return np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0)


def _painted(image: np.ndarray, labels: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Colours of the classes over the image in grey, and stripes where it is ignored: float (H, W, 3)."""
    ignored, grey = labels == IGNORED, image.mean(0)[..., None] / 255  # (H, W), (H, W, 1)
    painted = colors[np.where(ignored, 0, labels)] * CLASS_OPACITY + grey * (1 - CLASS_OPACITY)
    down, right = np.indices(labels.shape)
    stripes = (down + right) * 2 * STRIPES // min(labels.shape) % 2
    white_and_grey = np.array([to_rgb(color) for color in IGNORED_COLORS])
    return np.where(ignored[..., None], white_and_grey[stripes], painted)
