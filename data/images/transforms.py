"""Augmentation and evaluation transforms on uint8, and normalisation on the device.

Shapes: B images, C channels, h, w the model's image size.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F


def pretraining_transform(
    image_size: int | Sequence[int],
    min_scale: float = 0.2,
    max_scale: float = 1.0,
    horizontal_flip: float = 0.5,
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
) -> torch.nn.Module:
    """The augmentation of MAE (He et al. 2022, appendix A.1) and of SimMIM: a random crop, resized, and a flip.

    Args:
        image_size: int or (h, w), pixels.
        min_scale, max_scale: smallest and largest crop, as a fraction of the image's area.
        horizontal_flip: probability of a flip; 0 for digits and letters.
        interpolation: of the crop; MAE's is bicubic, SimMIM's bilinear.

    Returns:
        a module, uint8 (C, H, W) -> uint8 (C, h, w), which draws from torch's default generator only.
    """
    crop = v2.RandomResizedCrop(
        _height_width(image_size),
        scale=(min_scale, max_scale),
        interpolation=InterpolationMode(interpolation),
        antialias=True,
    )
    return v2.Compose([crop, v2.RandomHorizontalFlip(horizontal_flip)])


def evaluation_transform(image_size: int | Sequence[int], crop_ratio: float = 0.875) -> torch.nn.Module:
    """Resizes until the image covers image_size / crop_ratio, and crops its centre (224 px: resize to 256).

    Args:
        image_size: int or (h, w), pixels.
        crop_ratio: the part of the shorter side that is kept; with 1 nothing is cut off, and the image is resized to
            exactly (h, w), whatever its proportions.

    Returns:
        a module, uint8 (C, H, W) -> uint8 (C, h, w).
    """
    height, width = _height_width(image_size)
    if crop_ratio == 1:
        return v2.Resize((height, width), interpolation=InterpolationMode.BICUBIC, antialias=True)
    cover = ResizeToCover(round(height / crop_ratio), round(width / crop_ratio))
    return v2.Compose([cover, v2.CenterCrop((height, width))])


class ResizeToCover(torch.nn.Module):
    """Resizes, keeping proportions, to the smallest size that covers (height, width).

    For a square this is torchvision's `Resize(side)`, which knows no other shape.
    """

    def __init__(self, height: int, width: int):
        super().__init__()
        self.height, self.width = height, width

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[-2:]
        if self.width * height >= self.height * width:  # the width decides
            size = (height * self.width // width, self.width)
        else:
            size = (self.height, width * self.height // height)
        return F.resize(
            image, size, interpolation=InterpolationMode.BICUBIC, antialias=True
        )  # (C, H, W) -> (C, *size)


def normalize(
    pixel_values: torch.Tensor, mean: Sequence[float] | torch.Tensor, std: Sequence[float] | torch.Tensor
) -> torch.Tensor:
    """Returns (pixel_values / 255 - mean) / std as float32, on the device of pixel_values.

    Args:
        pixel_values: uint8 (B, C, h, w).
        mean, std: one number per channel, in units of [0, 1].

    Raises:
        ValueError: mean or std has another length than C.
    """
    num_channels = pixel_values.shape[-3]
    if len(mean) != num_channels or len(std) != num_channels:
        raise ValueError(
            f"{num_channels} channels need as many values in image_mean and image_std, got {len(mean)} and {len(std)}"
        )
    mean = 255 * torch.as_tensor(mean, dtype=torch.float32, device=pixel_values.device).view(-1, 1, 1)
    std = 255 * torch.as_tensor(std, dtype=torch.float32, device=pixel_values.device).view(-1, 1, 1)
    return pixel_values.to(torch.float32).sub_(mean).div_(std)


class Normalization:
    """`normalize` with mean and standard deviation already on the device, so that no step copies them.

    Args:
        mean, std: one number per channel, in units of [0, 1]; kept as attributes.
        device: of the images.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str):
        self.mean, self.std = list(mean), list(std)
        self._mean, self._std = (torch.tensor(values, device=device) for values in (mean, std))

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return normalize(pixel_values, self._mean, self._std)


def _height_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height, width


DenseTransform = Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]
