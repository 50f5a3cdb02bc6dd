"""Encoders and detectors under the names of detectron2's ViTDet (modeling/backbone/vit.py), for those who train there.

Its encoder has no class token and no last norm. An encoder that has seen a class token, as in pre-training and
wherever no windows are set, gives other features there than here: it serves as a start for training. With windows the
features are the same, and so are the maps of the pyramid that is on them. The heads of a detector are not exported:
detectron2 crops the maps half a cell further on, so trained heads would see other features.

D width, L patches, S side of a window.
"""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..configuration_mimae import MIMAEConfig
from .official_mae import official_state
from .timm_vit import vit_sizes

NET = "backbone.net."
_ENCODER = ("pos_embed", "patch_embed.", "blocks.")
_RELATIVE_POSITIONS = {
    "attention.relative_positions.height": "attn.rel_pos_h",
    "attention.relative_positions.width": "attn.rel_pos_w",
}
# of torchvision's convolution with a norm
_CONVOLUTION_PARTS = {"0": "", "1": "norm."}


def detectron2_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters that a detector of detectron2 has, under its names.

    Args:
        model: a ViT of this project with any head; the pyramid of a Mask R-CNN is included.

    Returns:
        `backbone.net.pos_embed` (1, 1+L, D), `backbone.net.blocks.{i}.attn.qkv.weight` (3D, D), the relative positions
        `backbone.net.blocks.{i}.attn.rel_pos_h` (2S-1, D / heads), and so on.

    Raises:
        ValueError: a model that detectron2's ViT cannot represent: positions on a grid that is not square, a bias
            of relative positions as BEiT has it, or windows larger than the grid.
    """
    pyramid = getattr(model, "pyramid", None)
    encoder: Any = model.base_model
    _check_config(encoder.config)
    state = {}
    for name, value in official_state(encoder).items():
        if name.startswith(_ENCODER):
            for ours, theirs in _RELATIVE_POSITIONS.items():
                name = name.replace(ours, theirs)
            state[NET + name] = value
    if pyramid is not None:
        finest = (encoder.config.patch_size // 4).bit_length() - 1  # log2 of the stride
        state |= {_pyramid_name(name, finest): value for name, value in pyramid.state_dict().items()}
    return state


def save_detectron2(model: PreTrainedModel, path: str | os.PathLike[str]) -> None:
    """Write `detectron2_state` as a `.pth` file of tensors, for `train.init_checkpoint` of detectron2.

    Raises:
        ValueError: see `detectron2_state`.
        OSError: the file cannot be written.
    """
    path = Path(path)
    state = {name: value.detach().cpu().contiguous() for name, value in detectron2_state(model).items()}
    partial = path.with_name(f".{path.name}.partial")
    try:
        torch.save({"model": state}, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def detectron2_usage(config: MIMAEConfig, path: str | os.PathLike[str]) -> str:
    """Python text for a configuration file of detectron2: the encoder, and where its parameters are."""
    global_blocks = [i for i in range(config.num_hidden_layers) if config.window_of_block(i) is None]
    sizes = vit_sizes(config)
    image_size = sizes.pop("img_size")[0]
    arguments = {**sizes, "pretrain_img_size": image_size}
    if config.window_size is not None:
        arguments |= {
            "img_size": image_size,
            "window_size": config.window_size,
            "window_block_indexes": [i for i in range(config.num_hidden_layers) if i not in global_blocks],
            "use_rel_pos": config.use_relative_position_embeddings,
        }
    lines = "".join(f"    {name}={value!r},\n" for name, value in arguments.items())
    return (
        "# for LayerNorms with eps="
        f"{config.layer_norm_eps}; model and train are those of detectron2's mask_rcnn_vitdet_b_100ep.py\n"
        f"model.backbone.net.update(\n{lines})\ntrain.init_checkpoint = {str(path)!r}"
    )


def _check_config(config: MIMAEConfig) -> None:
    height, width = config.grid_size
    if height != width:
        raise ValueError(f"positions on a grid of {height} x {width} patches: detectron2 takes square ones alone")
    if config.use_relative_position_bias:
        raise ValueError(
            "use_relative_position_bias=True has no place in detectron2's ViT, which has relative position embeddings"
        )
    if config.window_size is not None and config.window_size > height:
        raise ValueError(
            f"window_size={config.window_size} on a grid of {height} x {width} patches: detectron2 fills windows up "
            "with zeros, which take part in its attention"
        )


def _pyramid_name(name: str, finest: int) -> str:
    """levels.{level}.{place}.[{part}.]{parameter}, as torchvision's blocks have it → detectron2's."""
    _, level, place, *part, parameter = name.split(".")
    middle = "".join(_CONVOLUTION_PARTS[each] for each in part)
    return f"backbone.simfp_{finest + int(level)}.{place}.{middle}{parameter}"
