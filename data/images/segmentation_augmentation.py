"""Transforms of images and masks for semantic segmentation, in training and in evaluation.

Shapes: C channels, H, W an image's height and width, h, w those of the result.

The transforms take (image uint8 (C, H, W), mask (H, W)), as `SegmentationSource.decode` gives them, and return (image
float32 (C, h, w), normalised; mask int64). They draw from torch's default generator only. `mean` and `std` are one
number per channel, in units of [0, 1].
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .masks import IGNORED_CLASS
from .transforms import DenseTransform, Normalization

CROPS_TRIED = 10


def segmentation_training_transform(
    crop_size: int | Sequence[int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    short_side: int,
    long_side_limit: int,
    scale_range: tuple[float, float] = (0.5, 2.0),
    max_class_share: float = 0.75,
    horizontal_flip: float = 0.5,
    photometric_distortion: bool = True,
) -> DenseTransform:
    """The usual augmentation on ADE20K, that of mmsegmentation's configs/_base_/datasets/ade20k.py.

    Resized with its proportions so that it fits (long_side_limit, short_side) times a random ratio; a random crop
    that no class fills beyond its share, if ten tries find one; a flip; colours distorted; normalised; padded at the
    right and at the bottom, the image with zeros and the mask with 255.

    Args:
        crop_size: int or (h, w), pixels.
        short_side, long_side_limit: pixels at ratio 1; 512 and 2048 for ADE20K.
        scale_range: of the ratio, uniform.
        max_class_share: of a crop's pixels that are not ignored; 1: any crop will do.
        horizontal_flip: probability of a flip; 0 for digits and letters.
        photometric_distortion: brightness ± 32/255, contrast and saturation 0.5 to 1.5, hue ± 18°, each with
            probability 0.5, in torchvision's way: brightness is multiplied, not added to. Grey images have no
            saturation or hue, and keep theirs.
    """
    height, width = np.broadcast_to(crop_size, 2).tolist()
    steps = [
        FittingResize(short_side, long_side_limit, scale_range),
        MixedCrop(height, width, max_class_share),
        v2.RandomHorizontalFlip(horizontal_flip),
    ]
    if photometric_distortion:
        steps.append(PhotometricDistortion())
    return v2.Compose([*steps, *_normalization(mean, std), PadTo(height, width)])


def segmentation_evaluation_transform(
    short_side: int, long_side_limit: int, *, mean: Sequence[float], std: Sequence[float]
) -> DenseTransform:
    """Resizes the image alone, with its proportions, so that it fits (long_side_limit, short_side), and normalises.

    The mask keeps its size: predictions are compared at the original size. Numbers are as in training.
    """
    resize = v2.Lambda(FittingResize(short_side, long_side_limit), tv_tensors.Image)
    return v2.Compose([resize, *_normalization(mean, std)])


class FittingResize(v2.Transform):
    """Resizes to the largest size of the same proportions within (long side, short side), times a random ratio.

    torchvision's `Resize` cannot have both limits, its `ScaleJitter` does not care which side is the longer one.
    """

    def __init__(self, short_side: int, long_side: int, scale_range: tuple[float, float] = (1.0, 1.0)):
        super().__init__()
        self.short_side, self.long_side, self.scale_range = short_side, long_side, scale_range

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = F.get_size(flat_inputs[0])
        ratio = torch.empty(()).uniform_(*self.scale_range).item()
        factor = ratio * min(self.long_side / max(size), self.short_side / min(size))
        return {"size": [max(1, round(side * factor)) for side in size]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.resize(inpt, params["size"], antialias=True)  # bilinear; a mask's classes by the nearest pixel


class MixedCrop(v2.Transform):
    """A random crop, if possible of several classes, none of which fills more than its share.

    As in mmsegmentation's `RandomCrop` with `cat_max_ratio`: after ten crops with too much of one class, the next one
    is accepted. An image smaller than the crop is not cut.
    """

    def __init__(self, height: int, width: int, max_class_share: float):
        super().__init__()
        self.size, self.max_class_share = (height, width), max_class_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = next(inpt for inpt in flat_inputs if isinstance(inpt, tv_tensors.Mask))
        place = self._place(mask)
        for _ in range(CROPS_TRIED):
            if self._is_mixed(F.crop(mask, **place)):
                break
            place = self._place(mask)
        return place

    def _place(self, mask: tv_tensors.Mask) -> dict[str, int]:
        slack = [max(0, side - wanted) for side, wanted in zip(mask.shape, self.size, strict=True)]
        top, left = (int(torch.randint(pixels + 1, ())) for pixels in slack)
        height, width = (min(side, wanted) for side, wanted in zip(mask.shape, self.size, strict=True))
        return {"top": top, "left": left, "height": height, "width": width}

    def _is_mixed(self, mask: torch.Tensor) -> bool:
        counts = torch.bincount(mask[mask != IGNORED_CLASS])
        return bool(counts.sum() > 0 and counts.max() <= self.max_class_share * counts.sum())

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


class PhotometricDistortion(v2.RandomPhotometricDistort):
    """torchvision's, with its ranges, which are SSD's (arXiv 1512.02325), but without permuting channels."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return super().make_params(flat_inputs) | {"channel_permutation": None}


class PadTo(v2.Transform):
    """Pads at the right and at the bottom: images with zeros, masks with the ignored class."""

    def __init__(self, height: int, width: int):
        super().__init__()
        self.height, self.width = height, width

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = F.get_size(inpt)
        fill = IGNORED_CLASS if isinstance(inpt, tv_tensors.Mask) else 0
        return F.pad(inpt, [0, 0, self.width - width, self.height - height], fill=fill)


def _normalization(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    """Normalises images, and converts masks to int64."""
    return [
        v2.Lambda(Normalization(mean, std, "cpu"), tv_tensors.Image),
        v2.ToDtype({tv_tensors.Mask: torch.int64, "others": None}),
    ]
