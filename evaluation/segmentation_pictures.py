"""What a segmentation model sees in images, beside the truth.

Shapes: n images, C channels, H, W height and width of one image, K classes.
"""

import os
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .pictures import CLASS_COLORS, DPI, INK, _short, save_figure

IGNORED = 255
TITLES = ("Image", "Truth", "Predicted")
TILE = 2.1  # inches of an image's width
TALLEST = 1.5  # times its width; taller images are drawn narrower
LEGEND_LINE = 0.22  # inches
LEGEND_COLUMNS = 4
CLASS_OPACITY = 0.75  # over the image in grey
IGNORED_COLORS = ("#ffffff", "#c4c4c4")
STRIPES = 8  # pairs of them along the shorter side of an ignored image


def save_segmentations(
    images: Sequence[torch.Tensor],
    predictions: Sequence[torch.Tensor],
    references: Sequence[torch.Tensor],
    class_names: Sequence[str],
    path: str | os.PathLike,
) -> None:
    """Draw images, truth and predictions beside each other as a PNG that appears whole or not at all.

    Classes are colours over the image in grey, named below if they occur; pixels that are ignored are striped in both
    label maps.

    Args:
        images: n of uint8 (C, H, W), C = 1 or 3; of any sizes.
        predictions: n label maps (H, W).
        references: n label maps (H, W), 255 where a pixel is ignored.
        class_names: of the K classes, in order of their indices.
        path: where the PNG goes.

    Raises:
        ValueError: no image; a label map of another size than its image; a class without a name.
    """
    if not len(images):
        raise ValueError("no image to draw")
    rows = [
        (np.asarray(image), np.asarray(reference), np.asarray(prediction))
        for image, reference, prediction in zip(images, references, predictions, strict=True)
    ]
    for image, *label_maps in rows:
        for labels in label_maps:
            _check_label_map(labels, image.shape[1:], len(class_names))
    occurring = sorted({int(label) for _, *maps in rows for labels in maps for label in np.unique(labels)})
    colors = _class_colors(len(class_names))
    handles = [
        Patch(facecolor=colors[label], label=name)
        for label, name in enumerate(_short(class_names))
        if label in occurring
    ]
    if IGNORED in occurring:
        white, grey = IGNORED_COLORS
        handles.append(Patch(facecolor=white, edgecolor=grey, hatch="//////", linewidth=0, label="ignored"))
    save_figure(_draw(rows, colors, handles), path, DPI)


def _check_label_map(labels: np.ndarray, size: tuple[int, int], num_classes: int) -> None:
    if labels.shape != size:
        raise ValueError(f"a label map of {labels.shape} for an image of {size}")
    unnamed = [int(label) for label in np.unique(labels) if label != IGNORED and not 0 <= label < num_classes]
    if unnamed:
        raise ValueError(f"classes {unnamed[:10]} have no name: there are {num_classes} class_names")


def _class_colors(num_classes: int) -> np.ndarray:
    """Colours that can be told apart as well as so many can: float (K, 3)."""
    if num_classes <= len(CLASS_COLORS):
        return np.array([to_rgb(color) for color in CLASS_COLORS[:num_classes]])
    golden = np.arange(num_classes) * 0.618034 % 1  # neighbours in the list lie far apart on the colour wheel
    return colormaps["gist_rainbow"](golden)[:, :3]


def _draw(rows: list[tuple[np.ndarray, ...]], colors: np.ndarray, handles: list[Patch]) -> Figure:
    heights = [TILE * min(TALLEST, image.shape[1] / image.shape[2]) for image, *_ in rows]
    legend_lines = -(-len(handles) // LEGEND_COLUMNS)
    size = (TILE * len(TITLES), sum(heights) + 0.05 * len(rows) + 0.4 + LEGEND_LINE * (legend_lines + 1))
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    grid = figure.subplots(len(rows), len(TITLES), squeeze=False, height_ratios=heights)
    for axes_of_row, (image, *label_maps) in zip(grid, rows, strict=True):
        grey = image.mean(0) / 255  # (H, W)
        colour = image if len(image) == 3 else image.repeat(3, 0)
        _show(axes_of_row[0], colour.transpose(1, 2, 0))
        for axes, labels in zip(axes_of_row[1:], label_maps, strict=True):
            ignored = label_maps[0] == IGNORED
            _show(axes, _painted(grey, np.where(ignored, IGNORED, labels), colors))
    for axes, title in zip(grid[0], TITLES, strict=True):
        axes.set_title(title, color=INK, size=11, pad=6)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(LEGEND_COLUMNS, len(handles)),
        frameon=False,
        labelcolor=INK,
        fontsize=8.5,
        handlelength=1,
        handleheight=1,
    )
    return figure


def _show(axes: Axes, pixels: np.ndarray) -> None:
    axes.imshow(pixels, interpolation="nearest")
    axes.set_axis_off()


def _painted(grey: np.ndarray, labels: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Colours of the classes over the image in grey, and stripes where it is ignored: (H, W) → float (H, W, 3)."""
    ignored = labels == IGNORED
    painted = colors[np.where(ignored, 0, labels)] * CLASS_OPACITY + grey[..., None] * (1 - CLASS_OPACITY)
    down, right = np.indices(labels.shape)
    stripes = (down + right) * 2 * STRIPES // min(labels.shape) % 2
    white_and_grey = np.array([to_rgb(color) for color in IGNORED_COLORS])
    return np.where(ignored[..., None], white_and_grey[stripes], painted)
