"""MI-SimMIM's encoder, the Swin of SimMIM: what can start it, and what it can be exported to.

A stock Swin differs from ours, which is as the official one, in two things. It drops paths in the attention branch
alone, which matters where it is trained further. And it shifts the windows of a stage that has a single one at the
configuration's image size, until it has seen an image of that size: only then do features of larger images agree.

Shapes: S and T, relative offsets along a side, 2 · window - 1; H heads.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, SwinConfig, SwinForImageClassification, SwinModel

from ...configuration_misimmim import MISimMIMConfig
from ...modeling_misimmim import MISimMIMForImageClassification, MISimMIMForPreTraining, MISimMIMModel
from ..family import STOCK_FIELDS, TRAINING_FIELDS, CardWords, Family, StateDict, StockModel

logger = logging.getLogger(__name__)

BIAS_TABLE = "relative_position_bias_table"
SMALLEST_WINDOW = 3  # a cubic needs 4 points, and it has 5 offsets


def fit_tables(state: StateDict, there: MISimMIMConfig, model: PreTrainedModel) -> StateDict:
    """The weights of a Swin for other windows: its tables are interpolated, and the log says so.

    On the size of images no weight of a Swin depends.

    Args:
        state: weights of a model of `there`.
        model: that they are to fit.

    Raises:
        ValueError: see `interpolate_table`.
    """
    here = model.config
    if there.window_size == here.window_size:
        return state
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
    from scipy.interpolate import RectBivariateSpline  # which `import mimae` has no need of

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


def stock_fields(fields: Mapping[str, Any], is_classifier: bool) -> dict[str, Any]:
    """A Swin names no unit of a mask: it is as small as it may be, and divides every image that the model takes."""
    stride = fields["patch_size"] * 2 ** (len(fields["depths"]) - 1)
    return {"encoder_stride": stride, "mask_patch_size": stride}


STOCK = StockModel(
    format="swin",
    config_class=SwinConfig,
    encoder_class=SwinModel,
    classifier_class=SwinForImageClassification,
    fields=(
        *STOCK_FIELDS,
        *("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "drop_path_rate", "encoder_stride"),
    ),
    left_behind=("embeddings.mask_token",),
    tokens="(1, h·w, D), the last map row by row",
    pooled="tokens.mean(dim=1)",
    remark=(
        "Larger images than the processor makes have the features of the original only after one of its size has been "
        "seen: until\n"
        "then, a stock `SwinModel` shifts windows in a stage where that size has a single one."
    ),
)
FAMILY = Family(
    config_class=MISimMIMConfig,
    encoder_class=MISimMIMModel,
    pretraining_class=MISimMIMForPreTraining,
    classification_class=MISimMIMForImageClassification,
    words=CardWords(
        encoder="Swin",
        baseline="SimMIM",
        reconstruction="L_rec (Eq. 1, with the absolute error)",
        method=(
            "On a Swin, as here, it is called MI-SimMIM: a view is the whole grid of patches, with mask tokens in "
            "place of the masked\nones, and pixels are reconstructed by their absolute error."
        ),
        vector=", the mean of the map below",
    ),
    default_recipe="digits/misimmim.yaml",
    pretraining_types=("misimmim", "swin"),
    downstream_types=("misimmim", "swin"),
    size_fields=(
        *("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "qkv_bias", "use_absolute_embeddings"),
        *("patch_size", "encoder_stride", "num_channels"),
    ),
    free_fields=("image_size", "window_size", "mask_patch_size", *TRAINING_FIELDS),
    geometry_fields=("image_size", "window_size", "mask_patch_size"),
    fit_weights=fit_tables,
    remark=padding_remark,
    stock_config_class=SwinConfig,
    stock_fields=stock_fields,
    stock_classes={
        "SwinModel": MISimMIMModel,
        "SwinForMaskedImageModeling": MISimMIMForPreTraining,
        "SwinForImageClassification": MISimMIMForImageClassification,
    },
    stock=STOCK,
)
