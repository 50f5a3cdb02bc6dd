"""MI-MAE's encoder, the ViT of MAE: what can start it, and what it can be exported to."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTModel

from ...configuration_mimae import MIMAEConfig
from ...modeling_mimae import MIMAEForImageClassification, MIMAEForPreTraining, MIMAEModel, interpolate_positions
from ...modeling_mimae_backbone import MIMAEBackbone, resize_bias, resize_embeddings
from ..family import STOCK_FIELDS, TRAINING_FIELDS, CardWords, Family, StateDict, StockModel

logger = logging.getLogger(__name__)

POSITIONS = "embeddings.position_embeddings"
# of a backbone
RELATIVE_POSITIONS = r"layers\.\d+\.attention\.relative_position"


def fit_positions(state: StateDict, there: MIMAEConfig, model: PreTrainedModel) -> StateDict:
    """The weights of a ViT for images of another size: its positions are interpolated, and the log says so.

    Args:
        state: weights of a model of `there`.
        model: that they are to fit.
    """
    here = model.config
    if there.grid_size == here.grid_size:
        return state
    logger.info(
        "positions of images of %d x %d pixels are interpolated to %d x %d", *there.image_size_2d, *here.image_size_2d
    )
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    fitted = dict(state)
    for name, weight in state.items():
        if name.endswith(POSITIONS):
            fitted[name] = interpolate_positions(weight, there.grid_size, here.grid_size)
        elif re.match(RELATIVE_POSITIONS, name) and weight.shape != shapes[name]:
            fitted[name] = fit_relative_positions(weight, shapes[name])
    return fitted


def fit_relative_positions(weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Relative positions of a `MIMAEBackbone` for another grid."""
    return resize_bias(weight, (shape[1], shape[2])) if weight.ndim == 3 else resize_embeddings(weight, shape[0])


def stock_fields(fields: Mapping[str, Any], is_classifier: bool) -> dict[str, Any]:
    """The stock classifier knows the class token alone."""
    return {"classifier_pooling": "cls"} if is_classifier else {}


def refusal(model: PreTrainedModel) -> str | None:
    """A stock ViT has no place for a norm of averaged patches."""
    if not isinstance(model.base_model.layernorm, nn.Identity):
        return None
    return (
        "a stock ViT normalises every token and classifies the class token, but this classifier averages the "
        "patches first: export it with --to timm, or export the pre-trained checkpoint that it was made from"
    )


STOCK = StockModel(
    format="vit",
    config_class=ViTConfig,
    encoder_class=ViTModel,
    classifier_class=ViTForImageClassification,
    fields=(*STOCK_FIELDS, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    encoder_arguments={"add_pooling_layer": False},
    refusal=refusal,
    tokens="(1, 1+L, D), the class token first",
    pooled="tokens[:, 1:].mean(dim=1)",
    remark="`add_pooling_layer=False`, because the pooling layer that `ViTModel` adds on top was never trained.",
)
FAMILY = Family(
    config_class=MIMAEConfig,
    encoder_class=MIMAEModel,
    pretraining_class=MIMAEForPreTraining,
    classification_class=MIMAEForImageClassification,
    backbone_class=MIMAEBackbone,
    words=CardWords(encoder="ViT", baseline="a masked autoencoder"),
    default_recipe="demo.yaml",
    pretraining_types=("mimae", "vit_mae"),
    downstream_types=("mimae", "vit_mae", "vit"),
    size_fields=(
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "qkv_bias"),
        *("decoder_hidden_size", "decoder_num_hidden_layers"),
        *("decoder_num_attention_heads", "decoder_intermediate_size"),
        *("image_size", "patch_size", "num_channels"),
    ),
    free_fields=("image_size", "classifier_pooling", "latent_pooling", *TRAINING_FIELDS),
    dense_fields=(
        "use_relative_position_bias",
        "use_relative_position_embeddings",
        "window_size",
        "global_attention_indexes",
        "add_fpn",
    ),
    geometry_fields=("image_size",),
    fit_weights=fit_positions,
    head_keys=(r"classifier\.", r"fc_norm\."),
    backbone_keys=(r"fpn\.", RELATIVE_POSITIONS),
    poolings={"cls": {"latent_pooling": "cls", "classifier_pooling": "cls"}, "mean": {"latent_pooling": "mean"}},
    stock_config_class=ViTMAEConfig,
    stock_fields=stock_fields,
    stock_classes={"ViTMAEModel": MIMAEModel, "ViTMAEForPreTraining": MIMAEForPreTraining},
    stock=STOCK,
    formats=("timm", "mae", "detectron2"),
)
