"""Weights for other images and other attention windows than a checkpoint's: positions, and Swin's bias tables.

Shapes: S and T, relative offsets along a side, 2 · window - 1; H heads.
"""

import logging
from collections.abc import Mapping

import numpy as np
import torch
from scipy.interpolate import RectBivariateSpline

from ..configuration_mimae import MIMAEConfig
from ..configuration_misimmim import MISimMIMConfig
from ..modeling_mimae import interpolate_positions
from ..modeling_mimae_backbone import resize_bias, resize_embeddings

logger = logging.getLogger(__name__)

POSITIONS = "embeddings.position_embeddings"
BIAS_TABLE = "relative_position_bias_table"
SMALLEST_WINDOW = 3  # a cubic needs 4 points, and it has 5 offsets


def fit_vit_positions(
    state: Mapping[str, torch.Tensor], there: MIMAEConfig, here: MIMAEConfig
) -> dict[str, torch.Tensor]:
    """The weights of a ViT for images of another size: its positions are interpolated, and the log says so.

    Args:
        state: weights of a model of `there`.
        here: the configuration that they are to fit.
    """
    if there.grid_size == here.grid_size:
        return dict(state)
    logger.info(
        "positions of images of %d x %d pixels are interpolated to %d x %d", *there.image_size_2d, *here.image_size_2d
    )
    return {
        name: interpolate_positions(weight, there.grid_size, here.grid_size) if name.endswith(POSITIONS) else weight
        for name, weight in state.items()
    }


def fit_relative_positions(weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Relative positions of a `MIMAEBackbone` for another grid, or what else already has the shape as it is."""
    if weight.shape == shape:
        return weight
    return resize_bias(weight, tuple(shape[1:])) if weight.ndim == 3 else resize_embeddings(weight, shape[0])


def fit_swin_tables(
    state: Mapping[str, torch.Tensor], there: MISimMIMConfig, here: MISimMIMConfig
) -> dict[str, torch.Tensor]:
    """The weights of a Swin for other windows: its tables are interpolated, and the log says so.

    On the size of images no weight of a Swin depends.

    Args:
        state: weights of a model of `there`.
        here: the configuration that they are to fit.

    Raises:
        ValueError: see `interpolate_table`.
    """
    if there.window_size == here.window_size:
        return dict(state)
    logger.info(
        "relative-position tables of windows of %d x %d tokens are interpolated to %d x %d",
        *(there.window_size, there.window_size, here.window_size, here.window_size),
    )
    return {
        name: interpolate_table(weight, here.window_size) if name.endswith(BIAS_TABLE) else weight
        for name, weight in state.items()
    }


def interpolate_table(table: torch.Tensor, window_size: int) -> torch.Tensor:
    """Relative-position biases (S², H) for windows of another size, (T², H), each head on its own.

    As in microsoft/SimMIM, utils.py, `remap_pretrained_keys_swin`: the offsets that there are stand at
    `geometric_positions`, those that are wanted at whole numbers, and a cubic spline runs through all that there are.
    Beyond the outermost position it is constant. SciPy names `RectBivariateSpline` as the successor of the `interp2d`
    that is used there.

    Args:
        table: row by row over the offsets of a window.
        window_size: tokens per side of the new window.

    Raises:
        ValueError: the table is of a window of less than 3 tokens per side.
    """
    size = round(table.shape[0] ** 0.5)
    if size == 2 * window_size - 1:
        return table
    if size < 2 * SMALLEST_WINDOW - 1:
        raise ValueError(
            f"a relative-position table of windows of {(size + 1) // 2} tokens per side has too few offsets to be "
            f"interpolated to window_size={window_size}: keep the window_size of the checkpoint"
        )
    there = geometric_positions(size // 2, reach=window_size - 1)
    here = np.arange(1 - window_size, window_size)
    heads = table.double().cpu().numpy().T.reshape(-1, size, size)  # (H, S, S)
    resized = np.stack([RectBivariateSpline(there, there, head)(here, here) for head in heads], axis=-1)  # (T, T, H)
    return torch.from_numpy(resized).flatten(0, 1).to(table)


def geometric_positions(count: int, reach: float) -> np.ndarray:
    """Where offsets -count … count are put, (2 · count + 1,): symmetric, at distances 1, 1 + q, 1 + q + q², …

    q is found by bisection between 1.01 and 1.5, so that the last distance is `reach`, or as near as these bounds let
    it come: near offsets keep their meaning, and far ones are spread (or, where `reach` is smaller, cut off).
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        distances = np.cumsum(ratio ** np.arange(count))
        low, high = (low, ratio) if distances[-1] > reach else (ratio, high)
    return np.concatenate([-distances[::-1], [0.0], distances])


def padding_remark(config: MISimMIMConfig) -> str | None:
    """What to say where windows do not divide the map of some stage, which Swin pads with zeros then."""
    last_map = [side // config.encoder_stride for side in config.image_size_2d]
    maps = [[side * 2**stage for side in last_map] for stage in range(len(config.depths))]
    if not any(side % config.window_size for sides in maps for side in sides):
        return None
    # what divides the last map divides all
    fitting = [size for size in range(2, min(last_map) + 1) if not any(side % size for side in last_map)] or [1]
    nearest = min(fitting, key=lambda size: abs(size - config.window_size))
    return (
        f"windows of {config.window_size} x {config.window_size} tokens do not divide every map of images of "
        f"{config.image_size_2d[0]} x {config.image_size_2d[1]} pixels, and these are padded: window_size={nearest} "
        "would not pad"
    )
