"""Augmentation and evaluation transforms on uint8, and normalisation on the device.

Shapes: B images, C channels, h, w the model's image size; an `image_size` is (h, w) or one int for both, in pixels.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from PIL.Image import Resampling
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F
from transformers import ViTImageProcessor

DenseTransform = Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]


def pretraining_transform(
    image_size: int | Sequence[int],
    min_scale: float = 0.2,
    max_scale: float = 1.0,
    horizontal_flip: float = 0.5,
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
) -> torch.nn.Module:
    """The augmentation of MAE (He et al. 2022, appendix A.1) and of SimMIM: a random crop, resized, and a flip.

    Args:
        min_scale, max_scale: smallest and largest crop, as a fraction of the image's area.
        horizontal_flip: probability of a flip; 0 for digits and letters.
        interpolation: of the crop; MAE's is bicubic, SimMIM's bilinear.

    Returns:
        a module, uint8 (C, H, W) -> uint8 (C, h, w), which draws from torch's default generator only.
    """
    mode = InterpolationMode(interpolation)
    crop = v2.RandomResizedCrop(image_size, scale=(min_scale, max_scale), interpolation=mode, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(horizontal_flip)])


def evaluation_transform(image_size: int | Sequence[int], crop_ratio: float = 0.875) -> torch.nn.Module:
    """Resizes until the image covers image_size / crop_ratio, and crops its centre (224 px: resize to 256).

    Args:
        crop_ratio: the part of the shorter side that is kept; with 1 nothing is cut off, and the image is resized to
            exactly (h, w), whatever its proportions.

    Returns:
        a module, uint8 (C, H, W) -> uint8 (C, h, w).
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if crop_ratio == 1:
        return v2.Resize((height, width), interpolation=InterpolationMode.BICUBIC, antialias=True)
    cover = partial(_resize_to_cover, height=round(height / crop_ratio), width=round(width / crop_ratio))
    return v2.Compose([cover, v2.CenterCrop((height, width))])


def _resize_to_cover(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes, keeping proportions, to the smallest size that covers both; torchvision knows only squares."""
    old_height, old_width = image.shape[-2:]
    if width * old_height >= height * old_width:  # the width decides
        size = [old_height * width // old_width, width]
    else:
        size = [height, old_width * height // old_height]
    return F.resize(image, size, interpolation=InterpolationMode.BICUBIC, antialias=True)


class Normalization:
    """uint8 (B, C, h, w) -> (pixels / 255 - mean) / std, float32; they lie on the device, so that no step copies them.

    Args:
        mean, std: one number per channel, in units of [0, 1]; kept as attributes.
        device: of the images.

    Raises:
        ValueError: when called, mean or std has another length than C.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str):
        self.mean, self.std = list(mean), list(std)
        self._mean, self._std = (
            255 * torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1) for values in (mean, std)
        )

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        num_channels = pixel_values.shape[-3]
        if not num_channels == len(self.mean) == len(self.std):
            raise ValueError(
                f"{num_channels} channels need as many values in image_mean and image_std, got {len(self.mean)} and "
                f"{len(self.std)}"
            )
        return pixel_values.to(torch.float32).sub_(self._mean).div_(self._std)


IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def channel_statistics(
    num_channels: int, mean: list[float] | None, std: list[float] | None
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, in 0..1: those given, else ImageNet's for 3 channels, else 0.5.

    Raises:
        ValueError: not one value per channel.
    """
    is_rgb = num_channels == len(IMAGENET_MEAN)
    mean = mean or (IMAGENET_MEAN if is_rgb else [0.5] * num_channels)
    std = std or (IMAGENET_STD if is_rgb else [0.5] * num_channels)
    if len(mean) != num_channels or len(std) != num_channels:
        raise ValueError(
            f"image_mean={mean} and image_std={std} must have one value for each of num_channels={num_channels}"
        )
    return mean, std


def build_image_processor(image_size: tuple[int, int], mean: list[float], std: list[float]) -> ViTImageProcessor:
    """Resizes to (height, width) pixels, and normalises."""
    height, width = image_size
    return ViTImageProcessor(
        size={"height": height, "width": width},
        resample=Resampling.BICUBIC,
        image_mean=mean,
        image_std=std,
        do_convert_rgb=len(mean) == len(IMAGENET_MEAN),
    )
