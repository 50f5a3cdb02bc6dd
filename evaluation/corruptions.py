"""The corruptions of ImageNet-C made on the fly, for sets that have no published "-C".

They come from the library `imagecorruptions`, which follows the published generator but is other code, and images are
not saved as JPEG in between, as the published ones were: errors on the fly do not replace those on ImageNet-C, and
cannot be related to AlexNet's.

Shapes: C channels, H × W pixels of an image, h × w those that the model takes.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from ..data.images.transforms import evaluation_transform
from .robustness import CORRUPTIONS, SEVERITIES

SMALLEST_SIDE = 32  # pixels; the library refuses less
SEEDED_BY_ARGUMENT = ("glass_blur", "impulse_noise")  # the others draw from numpy's global generator


class CorruptedTransform(torch.nn.Module):
    """Resizes and crops as for evaluation, then corrupts: ImageNet-C's protocol (Hendrycks and Dietterich 2019).

    For a model of less than 32 px a side images are resized and cropped to 32 px, in the same proportions, corrupted
    there, and then resized to the model's size. That smooths noise, so corruptions are milder at such sizes.

    One channel is corrupted as three equal ones and turned back by their luma (ITU-R BT.601), which leaves two thirds
    of the standard deviation of noise that is independent between colours.

    What is random is a function of the seed and of the pixels: an image looks the same in every epoch, worker and
    process. The caller's random states do not change.

    Args:
        image_size: int or (h, w), pixels.
        corruption: one of `robustness.CORRUPTIONS`.
        severity: 1 to 5.
        seed: another one draws other noise.
        crop_ratio: as in `evaluation_transform`.

    Raises:
        ImportError: `imagecorruptions` is not installed, or does not import.
        ValueError: no such corruption or severity; on call, an image of neither one nor three channels.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        corruption: str,
        severity: int,
        *,
        seed: int = 0,
        crop_ratio: float = 0.875,
    ):
        super().__init__()
        if corruption not in CORRUPTIONS or severity not in SEVERITIES:
            raise ValueError(f"no corruption {corruption!r} of severity {severity}: there are {CORRUPTIONS}, 1 to 5")
        _library()  # a missing one is told here, not in a worker
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        scale = max(1.0, SMALLEST_SIDE / min(height, width))
        self.crop = evaluation_transform((math.ceil(scale * height), math.ceil(scale * width)), crop_ratio)
        self.resize = v2.Resize((height, width), interpolation=InterpolationMode.BICUBIC, antialias=True)
        self.corruption, self.severity, self.seed = corruption, severity, seed

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 (C, H, W) → uint8 (C, h, w), for C = 1 or 3."""
        channels = image.shape[0]
        if channels not in (1, 3):
            raise ValueError(f"images of {channels} channels cannot be corrupted: it is defined for grey and RGB")
        rgb = self.crop(image).expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()  # (h', w', 3)
        corrupted = torch.from_numpy(np.ascontiguousarray(self._corrupt(rgb).transpose(2, 0, 1)))  # (3, h', w')
        return self.resize(corrupted if channels == 3 else F.rgb_to_grayscale(corrupted))

    def _corrupt(self, image: np.ndarray) -> np.ndarray:
        seed = zlib.crc32(image.tobytes(), self.seed)
        argument = {"seed": seed} if self.corruption in SEEDED_BY_ARGUMENT else {}
        with _numpy_seed(seed):
            return _library()(image, severity=self.severity, corruption_name=self.corruption, **argument)


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """Seeds numpy's global generator, and restores it afterwards."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def _library() -> Callable[..., np.ndarray]:
    try:
        from imagecorruptions import corrupt
    except ImportError as error:
        raise ImportError(f"corrupting images on the fly needs `pip install 'mimae[robustness]'`: {error}") from error
    return corrupt
