"""The official MAE's checkpoint files (facebookresearch/mae), which ViTDet and mmsegmentation read, too.

Their names are those of timm's ViT, with a decoder beside it; q, k and v are one layer. The sizes of the model can
only be told from the shapes, and the numbers of heads not even from them.

D width, L patches, p patch size, C channels, K classes.
"""

import argparse
import math
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..configuration_mimae import MIMAEConfig
from ..data.words import some
from ..modeling_mimae import MIMAEForImageClassification, MIMAEForPreTraining, MIMAEModel, MIMAEPreTrainedModel

# MI-MAE without its information terms: what any MAE checkpoint is
PLAIN_MAE: dict[str, Any] = {"num_masks": 1, "mi_max_weight": 0.0, "mi_min_weight": 0.0}

# width → heads, of models_mae.py and of DeiT's smaller sizes
_HEADS = {"": {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}, "decoder_": {512: 16}}

_OFFICIAL_PREFIXES = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "vit.layers.": "blocks.",
    "vit.layernorm.": "norm.",
    "fc_norm.": "fc_norm.",
    "classifier.": "head.",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_embed.": "decoder_embed.",
    "decoder.decoder_layers.": "decoder_blocks.",
    "decoder.decoder_norm.": "decoder_norm.",
    "decoder.decoder_pred.": "decoder_pred.",
}
_OFFICIAL_PARTS = {
    ".layernorm_before.": ".norm1.",
    ".attention.qkv.": ".attn.qkv.",
    ".attention.o_proj.": ".attn.proj.",
    ".layernorm_after.": ".norm2.",
}
_OUR_PREFIXES = {official: ours for ours, official in _OFFICIAL_PREFIXES.items()}
_OUR_PARTS = {official: ours for ours, official in _OFFICIAL_PARTS.items()}
_OURS_ALONE = ("approximator.", "mi_gate.")


def official_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's parameters under the official names; the approximator V and the gate have none and stay behind."""
    state = model.state_dict(prefix="" if hasattr(model, "vit") else "vit.")
    merged = {}
    for name, value in state.items():
        if name.startswith(_OURS_ALONE) or ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            value = torch.cat([state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
        merged[name.replace(".q_proj.", ".qkv.")] = value
    return {_rename(name, _OFFICIAL_PREFIXES, _OFFICIAL_PARTS): value.contiguous() for name, value in merged.items()}


def model_from_official(state: Mapping[str, torch.Tensor], **known: Any) -> MIMAEPreTrainedModel:
    """The model whose parameters these are, in evaluation mode and float32.

    With a decoder it is a `MIMAEForPreTraining` without information terms, with a head a
    `MIMAEForImageClassification`, else a `MIMAEModel`.

    Args:
        state: parameters under the official names.
        known: fields of `MIMAEConfig` that the shapes do not tell; see `config_from_official`.

    Raises:
        ValueError: see `config_from_official`; names or shapes that no such model has.
    """
    config = config_from_official(state, **known)
    model: MIMAEForPreTraining | MIMAEForImageClassification | MIMAEModel
    if "decoder_embed.weight" in state:
        model = MIMAEForPreTraining(config)
    elif "head.weight" in state:
        model = MIMAEForImageClassification(config)
    else:
        model = MIMAEModel(config)
    prefix = "vit." if isinstance(model, MIMAEModel) else ""
    ours = {name.removeprefix(prefix): value for name, value in _our_state(state).items()}
    try:
        missing, unexpected = model.load_state_dict(ours, strict=False)
    except RuntimeError as error:
        raise ValueError(f"shapes that contradict each other: {error}") from error
    missing = [name for name in missing if not name.startswith(_OURS_ALONE)]
    if missing or unexpected:
        raise ValueError(
            f"not the parameters of a {type(model).__name__}: missing {some(sorted(missing))}; "
            f"not known {some(sorted(unexpected))}"
        )
    return model.eval()


def config_from_official(state: Mapping[str, torch.Tensor], **known: Any) -> MIMAEConfig:
    """Sizes from shapes; LayerNorm's eps and what is trained are the official MAE's.

    Args:
        known: fields that the shapes do not tell; those that are None do not count. `num_attention_heads` and
            `decoder_num_attention_heads`, needed unless the width is a standard one; `image_size`, needed unless the
            grid of patches is square.

    Raises:
        ValueError: parameters are missing, or one of these fields is needed.
    """
    known = {name: value for name, value in known.items() if value is not None}
    try:
        sizes = _encoder_sizes(state, known) | _decoder_sizes(state, known)
    except KeyError as error:
        raise ValueError(f"no parameter {error}: this is no checkpoint of an official MAE") from error
    if "head.weight" in state:
        sizes["num_labels"] = state["head.weight"].shape[0]  # (K, D)
        sizes["classifier_pooling"] = "mean" if "fc_norm.weight" in state else "cls"
    try:
        return MIMAEConfig(**PLAIN_MAE, **{**sizes, **known})
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error


def read_official_file(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The parameters in an official `.pth` file, its entry "model" or all of it, or in a `.safetensors` file.

    Nothing in the file is executed: beside tensors and plain values, only an `argparse.Namespace` is taken, in which
    official files keep the flags of their run.

    Raises:
        ValueError: the file holds anything else, is damaged, or has no parameters.
        OSError: it cannot be read.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain values ({''.join(reason)}). Nothing in it was "
            "executed; if it is yours, save its parameters alone: torch.save({'model': state_dict}, path)"
        ) from error
    state = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no parameters: an official MAE checkpoint has them under 'model'")
    return state


def _our_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`official_state` reversed; without what a model of ours alone has."""
    ours: dict[str, torch.Tensor] = {}
    for official, value in state.items():
        name = _rename(official, _OUR_PREFIXES, _OUR_PARTS)
        if ".attention.qkv." in name:
            parts = zip("qkv", value.chunk(3), strict=True)
            ours |= {name.replace(".qkv.", f".{part}_proj."): chunk for part, chunk in parts}
        else:
            ours[name] = value
    return ours


def _rename(name: str, prefixes: Mapping[str, str], parts: Mapping[str, str]) -> str:
    """A name under other prefixes and with other parts; one that has no known prefix stays, to be refused by it."""
    prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
    if prefix is None:
        return name
    renamed = prefixes[prefix] + name.removeprefix(prefix)
    for old, new in parts.items():
        renamed = renamed.replace(old, new)
    return renamed


def _encoder_sizes(state: Mapping[str, torch.Tensor], known: Mapping[str, Any]) -> dict[str, Any]:
    width, channels, patch_height, patch_width = state["patch_embed.proj.weight"].shape  # (D, C, p, p)
    if patch_height != patch_width:
        raise ValueError(f"patches of {patch_height} x {patch_width} pixels: only square ones are supported")
    num_patches = state["pos_embed"].shape[1] - 1  # (1, 1+L, D)
    side = math.isqrt(num_patches)
    if side**2 != num_patches and "image_size" not in known:
        raise ValueError(f"{num_patches} patches are no square grid: say --image_size HEIGHT WIDTH")
    return {
        "image_size": side * patch_height,
        "patch_size": patch_height,
        "num_channels": channels,
        "hidden_size": width,
        "num_hidden_layers": _depth(state, "blocks"),
        "num_attention_heads": _heads(width, "", known),
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
    }


def _decoder_sizes(state: Mapping[str, torch.Tensor], known: Mapping[str, Any]) -> dict[str, Any]:
    if "decoder_embed.weight" not in state:
        return {}
    width = state["decoder_embed.weight"].shape[0]  # (D_dec, D)
    return {
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": _depth(state, "decoder_blocks"),
        "decoder_num_attention_heads": _heads(width, "decoder_", known),
        "decoder_intermediate_size": state["decoder_blocks.0.mlp.fc1.weight"].shape[0],
    }


def _depth(state: Mapping[str, torch.Tensor], blocks: str) -> int:
    numbers = [int(found[1]) for found in (re.match(rf"{blocks}\.(\d+)\.", name) for name in state) if found]
    return 1 + max(numbers, default=-1)


def _heads(width: int, prefix: str, known: Mapping[str, Any]) -> int:
    field = f"{prefix}num_attention_heads"
    heads = known.get(field) or _HEADS[prefix].get(width)
    if heads is None:
        raise ValueError(
            f"the number of heads does not show in the shapes, and width {width} is not standard: say --{field}"
        )
    return heads
