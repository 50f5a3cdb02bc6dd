"""Transforms of images and their objects for detection, in training and evaluation, after ViTDet (arXiv 2203.16527).

Shapes: C channels, H, W an image's height and width, S the side of the square that the model takes, n objects.

The transforms take what `CocoSource.decode` returns and give a normalised image, float32 (C, S, S), with the picture
in its upper left corner; the rest is zero. They draw from torch's default generator. `image_size` is S; `mean` and
`std` are one number per channel, in units of [0, 1].
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .transforms import DenseTransform, Normalization

Target = dict[str, Any]

SMALLEST_BOX = 1.0  # pixels of the model's image


def large_scale_jitter(
    image_size: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    scale_range: tuple[float, float] = (0.1, 2.0),
    horizontal_flip: float = 0.5,
) -> DenseTransform:
    """The augmentation of ViTDet's training (appendix A.1; after Ghiasi et al. 2021, arXiv 2012.07177).

    A flip; the image is resized, keeping its proportions, so that it just fits a square of side S * scale; where it is
    larger than S a random crop is taken; it is normalised and, where it is smaller, padded with zeros.

    An object cut by the crop gets the box of the remaining part of its mask, as in ViTDet's recipe
    (`recompute_boxes`). Objects whose box is less than a pixel wide or high, or whose mask is empty, are left out.

    Args:
        scale_range: the scale is drawn from it uniformly.
        horizontal_flip: probability of a flip; 0 for digits and letters.

    Returns:
        A transform whose target has `boxes`, `labels` and `masks` (n, S, S), with n = 0 if no object is left.

    Raises:
        ValueError: the scales are not positive and in ascending order.
    """
    if not 0 < scale_range[0] <= scale_range[1]:
        raise ValueError(f"scale_range must be two positive numbers, the smaller first, got {scale_range}")
    return partial(
        _jitter,
        side=image_size,
        normalization=Normalization(mean, std, "cpu"),
        scale_range=scale_range,
        horizontal_flip=horizontal_flip,
    )


def detection_evaluation_transform(image_size: int, *, mean: Sequence[float], std: Sequence[float]) -> DenseTransform:
    """Resizes so that the longer side is S, normalises, and pads with zeros to the square.

    For S = 1024 this is ViTDet's test size: shorter side 1024, but no side longer than 1024.

    Returns:
        A transform that leaves the objects of the target as they are, in pixels of the original image, and adds what
        maps detections back to it: `image_size`, (h, w) of the part of the square that is picture, and
        `original_size`, (H, W).
    """
    return partial(_fit, side=image_size, normalization=Normalization(mean, std, "cpu"))


def _jitter(
    image: torch.Tensor,
    target: Target,
    *,
    side: int,
    normalization: Normalization,
    scale_range: tuple[float, float],
    horizontal_flip: float,
) -> tuple[torch.Tensor, Target]:
    tensors = [image, target["boxes"], target["masks"]]
    if torch.rand(()) < horizontal_flip:
        tensors = [F.horizontal_flip(tensor) for tensor in tensors]
    scale = torch.empty(()).uniform_(*scale_range).item()
    height, width = _fitting_size(image.shape[-2:], side * scale)
    tensors = [_resize(tensor, (height, width)) for tensor in tensors]
    (top, height), (left, width) = _cut(height, side), _cut(width, side)
    image, cropped, masks = (F.crop(tensor, top, left, height, width) for tensor in tensors)
    boxes = _tightened(tensors[1], cropped, masks, offset=[left, top])
    kept = ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST_BOX).all(1) & _has_pixels(masks)
    return _padded(normalization(image), side), {
        "boxes": tv_tensors.BoundingBoxes(boxes[kept], format="XYXY", canvas_size=(side, side)),
        "labels": target["labels"][kept],
        "masks": tv_tensors.Mask(_padded(masks[kept], side)),
    }


def _fit(
    image: torch.Tensor, target: Target, *, side: int, normalization: Normalization
) -> tuple[torch.Tensor, Target]:
    original_size = tuple(image.shape[-2:])
    image_size = _fitting_size(original_size, side)
    pixels = _padded(normalization(_resize(image, image_size)), side)
    return pixels, target | {"image_size": image_size, "original_size": original_size}


def _fitting_size(size: Sequence[int], side: float) -> tuple[int, int]:
    """The (height, width) of an image whose longer side has become `side`."""
    scale = side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _resize(tensor: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if not isinstance(tensor, tv_tensors.Mask):
        return F.resize(tensor, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)
    # For a mask torchvision takes the pixel at the corner of each sampled cell, which shifts it against its box.
    resized = F.resize(tensor.as_subclass(torch.Tensor), list(size), interpolation=InterpolationMode.NEAREST_EXACT)
    return tv_tensors.Mask(resized)


def _cut(length: int, side: int) -> tuple[int, int]:
    """Where a random window of at most `side` pixels begins, and its length."""
    return int(torch.randint(max(length - side, 0) + 1, ())), min(length, side)


def _tightened(boxes: torch.Tensor, cropped: torch.Tensor, masks: torch.Tensor, offset: list[int]) -> torch.Tensor:
    """Boxes (n, 4) after the crop: clipped, and those that were clipped no wider than what is left of the mask."""
    boxes, cropped = boxes.as_subclass(torch.Tensor), cropped.as_subclass(torch.Tensor).clone()
    was_cut = (cropped != boxes - torch.tensor([*offset, *offset])).any(1) & _has_pixels(masks)
    tight = masks_to_boxes(masks[was_cut])  # of the first and the last pixel, whose far edge is one further
    cropped[was_cut, :2] = torch.maximum(cropped[was_cut, :2], tight[:, :2])
    cropped[was_cut, 2:] = torch.minimum(cropped[was_cut, 2:], tight[:, 2:] + 1)
    return cropped


def _has_pixels(masks: torch.Tensor) -> torch.Tensor:
    return masks.as_subclass(torch.Tensor).bool().flatten(1).any(1)  # (n, S, S) -> (n,)


def _padded(tensor: torch.Tensor, side: int) -> torch.Tensor:
    """Zeros below and to the right, as a plain tensor (..., S, S)."""
    height, width = tensor.shape[-2:]
    return torch.nn.functional.pad(tensor.as_subclass(torch.Tensor), (0, side - width, 0, side - height))
