"""The image processor of a model: size, mean and standard deviation, as in `preprocessor_config.json`."""

from PIL.Image import Resampling
from transformers import ViTImageProcessor

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
