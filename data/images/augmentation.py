"""Augmentation for supervised training: crops, RandAugment, random erasing, mixup, CutMix.

Shapes: B images, K classes, C channels, h, w the model's image size.

The transforms take uint8 (C, H, W) and return the model's input, float32 (C, h, w), normalised. They and the mixing
draw from the default generators of torch, Python and numpy. `image_size` is (h, w) or one int for both, in pixels;
`mean` and `std` are one number per channel, in units of [0, 1].
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data import Mixup, RandAugment, rand_augment_transform
from timm.data.auto_augment import posterize
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import v2

from .transforms import Normalization, pretraining_transform

Transform = Callable[[torch.Tensor], torch.Tensor]
Mixing = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def finetuning_transform(
    image_size: int | Sequence[int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    random_erasing: float = 0.25,
    min_crop_scale: float = 0.08,
    max_crop_scale: float = 1.0,
    horizontal_flip: float = 0.5,
) -> Transform:
    """The augmentation of MAE's fine-tuning (He et al. 2022, table 9).

    A random crop, resized (bicubic), a flip, timm's RandAugment, normalisation, and timm's random erasing with normal
    noise.

    Args:
        auto_augment: timm's description of a RandAugment, or None; areas emptied by shears and rotations get `mean`.
        random_erasing: probability that a rectangle is erased.
        min_crop_scale, max_crop_scale: smallest and largest crop, as a fraction of the image's area.
        horizontal_flip: probability of a flip; 0 for digits and letters.

    Raises:
        ValueError: not the description of a RandAugment; RandAugment for images that are neither grey nor RGB.
    """
    steps: list[Transform] = [pretraining_transform(image_size, min_crop_scale, max_crop_scale, horizontal_flip)]
    if auto_augment is not None:
        steps += [v2.ToPILImage(), _rand_augment(auto_augment, mean), v2.PILToTensor()]
    steps.append(Normalization(mean, std, "cpu"))
    if random_erasing > 0:
        steps.append(RandomErasing(random_erasing, mode="pixel", device="cpu"))
    return v2.Compose(steps)


def probe_transform(
    image_size: int | Sequence[int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    min_crop_scale: float = 0.08,
    horizontal_flip: float = 0.5,
) -> Transform:
    """The augmentation of MAE's linear probe (He et al. 2022, table 10): a random crop, resized, and a flip."""
    return normalized(pretraining_transform(image_size, min_crop_scale, 1.0, horizontal_flip), mean=mean, std=std)


def normalized(transform: Transform, *, mean: Sequence[float], std: Sequence[float]) -> Transform:
    """Puts normalisation after a transform that gives uint8, as `evaluation_transform`."""
    return v2.Compose([transform, Normalization(mean, std, "cpu")])


def _rand_augment(description: str, mean: Sequence[float]) -> RandAugment:
    if len(mean) not in (1, 3):
        raise ValueError(
            f"RandAugment is defined for images of 1 or 3 channels, not of {len(mean)}: set --auto_augment none"
        )
    grey_values = tuple(min(255, round(255 * value)) for value in mean)
    fill = grey_values if len(mean) == 3 else grey_values[0]  # Pillow takes no tuple for one channel
    try:
        transform = rand_augment_transform(description, {"img_mean": fill, "interpolation": Image.Resampling.BICUBIC})
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"auto_augment is {description!r}, but must describe a RandAugment, as 'rand-m9-mstd0.5-inc1'"
        ) from error
    for operation in transform.ops:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """At full magnitude timm keeps 0 bits, which is black; newer versions of Pillow refuse to."""
    return posterize(image, bits_to_keep, **options) if bits_to_keep else Image.new(image.mode, image.size)


def mixing(
    num_classes: int,
    batch_size: int,
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    probability: float = 1.0,
    switch_probability: float = 0.5,
    label_smoothing: float = 0.0,
) -> Mixing | None:
    """Mixup (arXiv 1710.09412), CutMix (arXiv 1905.04899) and label smoothing, by timm, for whole batches.

    Args:
        batch_size: B, images of one process and step.
        mixup, cutmix: α of the Beta(α, α) that the share of an image is drawn from; 0: off.
        probability: that a batch is mixed at all.
        switch_probability: of CutMix where both are on.
        label_smoothing: ε, spread evenly over the K classes.

    Returns:
        a function (float32 (B, C, h, w), int64 (B,)) -> (the same mixed, in place; soft labels float32 (B, K)), or
        None if there is nothing to do and labels stay as they are.

    Raises:
        ValueError: an odd batch, whose images cannot be paired.
    """
    if mixup == 0 and cutmix == 0:
        return partial(_smooth, num_classes, label_smoothing) if label_smoothing else None
    if batch_size % 2:
        raise ValueError(
            f"mixup and cutmix mix the images of a batch in pairs: --per_device_train_batch_size must be even, "
            f"not {batch_size}"
        )
    return Mixup(
        mixup_alpha=mixup,
        cutmix_alpha=cutmix,
        prob=probability,
        switch_prob=switch_probability,
        label_smoothing=label_smoothing,
        num_classes=num_classes,
    )


def _smooth(
    num_classes: int, label_smoothing: float, pixel_values: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return pixel_values, mixup_target(labels, num_classes, smoothing=label_smoothing)  # (B,) -> (B, K)
