"""The kinds of models that the scripts train, and whose checkpoints each can start from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, SwinConfig, ViTMAEConfig

from ..configuration_mimae import MIMAEConfig
from ..configuration_misimmim import MISimMIMConfig
from ..modeling_mimae import MIMAEForImageClassification, MIMAEForPreTraining, MIMAEModel
from ..modeling_misimmim import MISimMIMForImageClassification, MISimMIMForPreTraining, MISimMIMModel
from .arguments import RecipeError, config_fields


@dataclass(frozen=True)
class Family:
    """A kind of model.

    config_class, encoder_class, pretraining_class, classification_class: its classes.
    stock_config_class: of transformers' own model, whose defaults hold where a checkpoint's config.json is silent.
    pretraining_types: `model_type`s of the checkpoints that pre-training can start from.
    downstream_types: of those that have an encoder for it.
    size_fields: where these differ, a checkpoint's weights do not fit in pre-training.
    free_fields: what a downstream recipe may set although the checkpoint says otherwise.
    """

    config_class: type[PreTrainedConfig]
    encoder_class: type[PreTrainedModel]
    pretraining_class: type[PreTrainedModel]
    classification_class: type[PreTrainedModel]
    stock_config_class: type[PreTrainedConfig]
    pretraining_types: tuple[str, ...]
    downstream_types: tuple[str, ...]
    size_fields: tuple[str, ...]
    free_fields: tuple[str, ...]

    def build_config(self, preset: str | None, fields: Mapping[str, Any], **labels: Any) -> PreTrainedConfig:
        """The configuration of a preset's sizes, or of the class's defaults, with these fields on top.

        Raises:
            RecipeError: a field that models of this kind do not have.
            ValueError: an unknown preset, or fields that the configuration refuses.
        """
        if foreign := sorted(set(fields) - set(config_fields(self.config_class))):
            raise RecipeError(f"{', '.join(foreign)}: no field of model_type {self.config_class.model_type!r}")
        make = self.config_class if preset is None else lambda **rest: self.config_class.preset(preset, **rest)
        return make(**fields, **labels)


MIMAE = Family(
    config_class=MIMAEConfig,
    encoder_class=MIMAEModel,
    pretraining_class=MIMAEForPreTraining,
    classification_class=MIMAEForImageClassification,
    stock_config_class=ViTMAEConfig,
    pretraining_types=("mimae", "vit_mae"),
    downstream_types=("mimae", "vit_mae", "vit"),
    size_fields=(
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "decoder_num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
        "num_channels",
        "qkv_bias",
        "decoder_hidden_size",
        "decoder_num_hidden_layers",
        "decoder_intermediate_size",
    ),
    free_fields=(
        "image_size",
        "drop_path_rate",
        "classifier_pooling",
        "latent_pooling",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "layer_norm_eps",
    ),
)
MISIMMIM = Family(
    config_class=MISimMIMConfig,
    encoder_class=MISimMIMModel,
    pretraining_class=MISimMIMForPreTraining,
    classification_class=MISimMIMForImageClassification,
    stock_config_class=SwinConfig,
    pretraining_types=("misimmim", "swin"),
    downstream_types=("misimmim", "swin"),
    size_fields=(
        "embed_dim",
        "depths",
        "num_heads",
        "window_size",
        "mlp_ratio",
        "patch_size",
        "encoder_stride",
        "num_channels",
        "qkv_bias",
    ),
    free_fields=(
        "image_size",
        "window_size",
        "mask_patch_size",
        "drop_path_rate",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "layer_norm_eps",
    ),
)
FAMILIES = {family.config_class.model_type: family for family in (MIMAE, MISIMMIM)}
CONFIG_CLASSES = tuple(family.config_class for family in FAMILIES.values())


def family_named(model_type: str) -> Family:
    """The family that a recipe names.

    Raises:
        RecipeError: there is none of that name.
    """
    if model_type not in FAMILIES:
        raise RecipeError(f"model_type={model_type!r} is not known; there are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
