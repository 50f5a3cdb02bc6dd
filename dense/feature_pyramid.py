"""ViTDet's simple feature pyramid (Li et al. 2022, arXiv 2203.16527, Sec. 3): all levels from the last map alone.

B images, D width of the encoder, F channels of the pyramid, h, w rows and columns of the patch grid.
"""

from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import Conv2dNormActivation

LEVEL_NAMES = ("0", "1", "2", "3")
POOLED_LEVEL_NAME = "pool"

# over the channels of each place of a map (B, C, h, w)
ChannelNorm = partial(LayerNorm2d, eps=1e-6)


class SimpleFeaturePyramid(nn.Module):
    """One map → five, of which all but the last have parameters (detectron2, modeling/backbone/vit.py).

    Args:
        in_channels: D, divisible by 4.
        out_channels: F.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        half, quarter = in_channels // 2, in_channels // 4
        four_times = [_twice(in_channels, half), ChannelNorm(half), nn.GELU(), _twice(half, quarter)]
        self.levels = nn.ModuleList(
            nn.Sequential(
                *resize, _convolution(channels, out_channels, side=1), _convolution(out_channels, out_channels, side=3)
            )
            for resize, channels in (
                (four_times, quarter),
                ([_twice(in_channels, half)], half),
                ([], in_channels),
                ([nn.MaxPool2d(kernel_size=2)], in_channels),
            )
        )

    def forward(self, feature_map: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """(B, D, h, w) → maps (B, F, ·, ·) of 4, 2, 1, 1/2 and 1/4 times its size, named as torchvision's are."""
        maps = OrderedDict((name, level(feature_map)) for name, level in zip(LEVEL_NAMES, self.levels, strict=True))
        # every other place, as in detectron2's LastLevelMaxPool
        maps[POOLED_LEVEL_NAME] = nn.functional.max_pool2d(maps[LEVEL_NAMES[-1]], kernel_size=1, stride=2)
        return maps


def _twice(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)


def _convolution(in_channels: int, out_channels: int, side: int) -> Conv2dNormActivation:
    return Conv2dNormActivation(
        in_channels, out_channels, kernel_size=side, norm_layer=ChannelNorm, activation_layer=None
    )
