"""Pictures of detections, beside the annotated objects.

Shapes: C channels, H, W height and width of an image, n its objects, m its detections, K classes.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as run_length
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .classes import CLASS_COLORS, DPI, INK, save_figure

SIDE = 2.6  # inches of an image's longer side
PAIRS_IN_A_ROW = 2
COLUMN_TITLES = ("true", "detected")
MASK_OPACITY = 0.45
MIN_SCORE = 0.5


def save_detections(
    images: Sequence[torch.Tensor],
    detections: Sequence[dict[str, Any]],
    references: Sequence[dict[str, Any]],
    class_names: Sequence[str],
    path: str | os.PathLike[str],
) -> None:
    """Draw images with their objects and, beside each, with its detections, as a PNG that appears whole or not.

    A class has one colour throughout. Detections of a score of at least 0.5 are drawn, and named with it in %.

    Args:
        images: uint8 (C, H, W) each, C 1 or 3, of any sizes.
        detections: of each image, as `restore_detections` gives them: `boxes` (m, 4), `scores`, `labels`, and
            `masks`, m run-length codes.
        references: of each image, as `CocoSource.decode` gives them: `boxes` (n, 4), `labels`, `masks` (n, H, W).
        class_names: of the K classes, in label order.

    Raises:
        ValueError: no image, or other numbers of images, detections and references.
    """
    if not len(images) == len(detections) == len(references) > 0:
        raise ValueError(
            "a picture needs as many detections and references as images, and at least one; got "
            f"{len(images)} images, {len(detections)} detections and {len(references)} references"
        )
    pairs = min(PAIRS_IN_A_ROW, len(images))
    rows = -(-len(images) // pairs)
    figure = Figure(figsize=(2 * pairs * SIDE, rows * SIDE + 0.3), facecolor="white", layout="constrained")
    grid = figure.subplots(rows, 2 * pairs, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    panels = grid.reshape(-1, 2)  # row by row, true and detected
    for panel, image, found, truth in zip(panels, images, detections, references, strict=False):
        names = [class_names[label] for label in truth["labels"]]
        _draw(panel[0], image, truth["boxes"], truth["masks"].numpy(), truth["labels"], names)
        order = found["scores"].argsort()  # the surest is drawn last, on top
        chosen = order[found["scores"][order] >= MIN_SCORE]
        masks = [run_length.decode(found["masks"][index]) for index in chosen]
        labels = found["labels"][chosen]
        scored = [
            f"{class_names[label]} {100 * score:.0f}"
            for label, score in zip(labels, found["scores"][chosen], strict=True)
        ]
        _draw(panel[1], image, found["boxes"][chosen], masks, labels, scored)
    for panel in panels[:pairs]:
        for axes, title in zip(panel, COLUMN_TITLES, strict=True):
            axes.set_title(title, color=INK, size=10, pad=6)
    save_figure(figure, path, DPI)


def _draw(
    axes: Axes,
    image: torch.Tensor,
    boxes: torch.Tensor,
    masks: Sequence[np.ndarray],
    labels: torch.Tensor,
    captions: Sequence[str],
) -> None:
    height, width = image.shape[-2:]
    pixels = image.float().expand(3, -1, -1).permute(1, 2, 0).numpy() / 255  # (H, W, 3)
    colors = [to_rgb(_color(label)) for label in labels.tolist()]
    for mask, color in zip(masks, colors, strict=True):
        pixels = np.where(mask[..., None] > 0, (1 - MASK_OPACITY) * pixels + MASK_OPACITY * np.array(color), pixels)
    axes.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest")
    for box, color, caption in zip(boxes.tolist(), colors, captions, strict=True):
        _draw_box(axes, box, color, caption, height)


def _draw_box(axes: Axes, box: Sequence[float], color: tuple[float, float, float], caption: str, height: int) -> None:
    left, top, right, bottom = box
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=1.4))
    above = top > 0.08 * height  # else the name would leave the image: it goes inside the box
    axes.annotate(
        caption,
        (left, top),
        xytext=(1.2, 1.2 if above else -1.2),
        textcoords="offset points",
        va="bottom" if above else "top",
        size=6.5,
        color="white" if np.dot(color, (0.299, 0.587, 0.114)) < 0.6 else INK,
        bbox={"boxstyle": "square,pad=0.15", "facecolor": color, "edgecolor": color, "linewidth": 1.0},
        annotation_clip=False,
    )


def _color(label: int) -> Any:
    """A class's colour: of many classes those of neighbouring labels lie far apart."""
    return CLASS_COLORS[label] if label < len(CLASS_COLORS) else colormaps["hsv"](label * 0.618 % 1)
