"""Pictures of masked views and their reconstructions.

Shapes: B images, N masks per image, C channels, H × W pixels, L units of a mask, P = unit_size² · C values of one, in
the order of `patchify`. In a mask 1 is masked, 0 is visible.
"""

import os
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

from ..modeling_mim import patchify, unpatchify
from .classes import INK, save_figure

TILE_SIZE = 128  # pixels of the longer side of a small image, at least
GAP = 4  # pixels between images
GROUP_GAP = 28  # pixels between originals, views and reconstructions
HEADER = 56  # pixels above the images
FAINT = "#8a8a8a"


def reconstruction_images(
    pixel_values: torch.Tensor,
    logits: torch.Tensor,
    mask: torch.Tensor,
    *,
    unit_size: int,
    norm_pix_loss: bool,
    mask_color: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each image, its N masked views, and its N reconstructions with the visible patches pasted in.

    With `norm_pix_loss` the model predicts each patch relative to that patch's own mean and deviation, which it never
    learns. The picture takes them from the true patch: it shows the predicted structure in the true brightness.

    Args:
        pixel_values: (B, C, H, W), normalised.
        logits: (B, N, L, P), the predicted patches.
        mask: (B, N, L), 1 where a patch was masked.
        unit_size: side in pixels of what an entry of the mask stands for.
        norm_pix_loss: whether the predictions are of normalised patches.
        mask_color: (C,), what masked patches are painted with; zeros, the mean colour, by default.

    Returns:
        (B, 1 + 2N, C, H, W), float32, in the space of `pixel_values`.
    """
    height, width = pixel_values.shape[-2:]
    target = patchify(pixel_values.float(), unit_size)[:, None]  # (B, 1, L, P)
    predicted = logits.float()  # (B, N, L, P)
    if norm_pix_loss:
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)  # (B, 1, L, 1)
        predicted = predicted * (variance + 1e-6) ** 0.5 + mean
    if mask_color is None:
        mask_color = target.new_zeros(pixel_values.shape[1])
    masked = mask.bool()[..., None]  # (B, N, L, 1)
    views = torch.where(masked, mask_color.to(target).repeat(unit_size**2), target)
    completed = torch.where(masked, predicted, target)
    shown = torch.cat([target, views, completed], dim=1)  # (B, 1 + 2N, L, P)
    return unpatchify(shown.flatten(0, 1), unit_size, (height, width)).unflatten(0, shown.shape[:2])


def save_reconstructions(
    path: str | os.PathLike[str],
    pixel_values: torch.Tensor,
    logits: torch.Tensor,
    mask: torch.Tensor,
    *,
    unit_size: int,
    norm_pix_loss: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Draw `reconstruction_images` as a PNG, one row an image. It appears at `path` whole or not at all.

    One channel is shown as grey, three as RGB, any other number as the grey of their mean.

    Args:
        pixel_values, logits, mask, unit_size, norm_pix_loss: as in `reconstruction_images`, on the CPU.
        mean, std: per channel, what the pixels in [0, 1] were normalised with.
    """
    offset, scale = (torch.tensor(each)[:, None, None] for each in (mean, std))  # (C, 1, 1)
    images = reconstruction_images(
        pixel_values,
        logits.detach(),
        mask,
        unit_size=unit_size,
        norm_pix_loss=norm_pix_loss,
        mask_color=((0.5 - offset) / scale).flatten(),
    )
    figure = _draw(_to_rgb(images * scale + offset), num_masks=mask.shape[1])
    save_figure(figure, path, dpi=figure.dpi)


def _to_rgb(images: torch.Tensor) -> np.ndarray:
    """(B, K, C, H, W) in [0, 1] to (B, K, H, W, 3) in [0, 1]."""
    if images.shape[2] != 3:
        images = images.mean(2, keepdim=True).expand(-1, -1, 3, -1, -1)
    return images.clamp(0, 1).movedim(2, -1).numpy()


def _draw(images: np.ndarray, num_masks: int) -> Figure:
    """Lay (B, 1 + 2N, H, W, 3) out in three groups of columns, pixel for pixel on one white canvas."""
    scale = max(1, round(TILE_SIZE / max(images.shape[2:4])))
    images = images.repeat(scale, axis=2).repeat(scale, axis=3)  # nearest: the pixels stay pixels
    num_rows, num_columns, tile_height, tile_width = images.shape[:4]
    lefts = [
        GAP + column * (tile_width + GAP) + GROUP_GAP * ((column > 0) + (column > num_masks))
        for column in range(num_columns)
    ]
    canvas = np.ones((HEADER + num_rows * (tile_height + GAP), lefts[-1] + tile_width + GAP, 3), np.float32)
    for row in range(num_rows):
        top = HEADER + row * (tile_height + GAP)
        for column, left in enumerate(lefts):
            canvas[top : top + tile_height, left : left + tile_width] = images[row, column]

    height, width = canvas.shape[:2]
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(canvas, interpolation="nearest", aspect="auto", extent=(0, width, height, 0))
    groups = (
        ("Original", [0]),
        ("Seen", range(1, 1 + num_masks)),
        ("Reconstructed", range(1 + num_masks, num_columns)),
    )
    for title, columns in groups:
        left, right = lefts[columns[0]], lefts[columns[-1]] + tile_width
        axes.text((left + right) / 2, 20, title, color=INK, size=13, ha="center", va="center")
        for number, column in enumerate(columns, start=1):
            if len(columns) > 1:
                axes.text(
                    lefts[column] + tile_width / 2, 42, f"mask {number}", color=FAINT, size=9, ha="center", va="center"
                )
    return figure
