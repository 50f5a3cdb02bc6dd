"""The kinds of models that the scripts train, and whose checkpoints each can start from."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, SwinConfig, ViTMAEConfig

from ..configuration_mimae import MIMAEConfig
from ..configuration_misimmim import MISimMIMConfig
from ..flags.option import RecipeError
from ..flags.recipes import config_fields
from ..modeling_mimae import MIMAEForImageClassification, MIMAEForPreTraining, MIMAEModel
from ..modeling_mimae_backbone import MIMAEBackbone
from ..modeling_misimmim import MISimMIMForImageClassification, MISimMIMForPreTraining, MISimMIMModel
from .geometry import fit_swin_tables, fit_vit_positions, padding_remark

# what a backbone has beside its sizes, as every encoder
BACKBONE_FIELDS = (
    "drop_path_rate",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "layer_norm_eps",
    "hidden_act",
    "initializer_range",
)


@dataclass(frozen=True)
class Family:
    """A kind of model.

    config_class, encoder_class, pretraining_class, classification_class: its classes.
    backbone_class: the encoder for dense prediction; None where there is none.
    stock_config_class: of transformers' own model, whose defaults hold where a checkpoint's config.json is silent.
    pretraining_types: `model_type`s of the checkpoints that pre-training can start from.
    downstream_types: of those that have an encoder for it.
    size_fields: where these differ, a checkpoint's weights do not fit in pre-training.
    free_fields: what a downstream recipe may set although the checkpoint says otherwise.
    dense_fields: the same, of the backbone alone.
    geometry_fields: those of them for which a checkpoint's weights are made to fit, by
    fit_weights: of a state dict, the configuration that it is of, and the one that it is to fit.
    stock_fields: what follows from a stock checkpoint's fields, and from whether it is a classifier.
    poolings: how a frozen encoder's features may be pooled, the usual way first, each with the fields under which
        they are the encoder's `pooler_output`; under those of the first a classifier sees the same.
    remark: what is worth a line of the log about a configuration, or None.
    """

    config_class: type[PreTrainedConfig]
    encoder_class: type[PreTrainedModel]
    pretraining_class: type[PreTrainedModel]
    classification_class: type[PreTrainedModel]
    backbone_class: type[PreTrainedModel] | None
    stock_config_class: type[PreTrainedConfig]
    pretraining_types: tuple[str, ...]
    downstream_types: tuple[str, ...]
    size_fields: tuple[str, ...]
    free_fields: tuple[str, ...]
    dense_fields: tuple[str, ...]
    geometry_fields: tuple[str, ...]
    fit_weights: Callable[[Mapping[str, torch.Tensor], PreTrainedConfig, PreTrainedConfig], Mapping[str, torch.Tensor]]
    stock_fields: Callable[[Mapping[str, Any], bool], dict[str, Any]]
    poolings: Mapping[str, Mapping[str, Any]]
    remark: Callable[[PreTrainedConfig], str | None]

    @property
    def name(self) -> str:
        """The `model_type` of its configuration."""
        return self.config_class.model_type

    @property
    def usual_pooling(self) -> str:
        """The first of `poolings`."""
        return next(iter(self.poolings))

    def pooling(self, name: str | None) -> str:
        """The pooling that a recipe names, or the usual one where it names none.

        Raises:
            RecipeError: models of this kind have no such pooling.
        """
        if name is not None and name not in self.poolings:
            raise RecipeError(f"feature_pooling={name!r}: {self.name} has {', '.join(self.poolings)} alone")
        return name or self.usual_pooling

    def check_task(self, fields: Iterable[str], is_dense: bool) -> None:
        """Raises a RecipeError where models of this kind have no backbone for a dense task, or others no such fields.

        What of the fields is the backbone's alone would change nothing in another model.
        """
        if is_dense and self.backbone_class is None:
            raise RecipeError(
                f"model_type {self.name!r} has no backbone for dense prediction; there is one for "
                f"{', '.join(each.name for each in FAMILIES.values() if each.backbone_class)}"
            )
        if is_dense and (foreign := sorted(set(fields) - {*self.size_fields, *self.dense_fields, *BACKBONE_FIELDS})):
            raise RecipeError(
                f"{', '.join(foreign)}: nothing that a backbone for dense prediction has: leave them out"
            )
        if not is_dense and (foreign := sorted(set(fields) & set(self.dense_fields))):
            raise RecipeError(
                f"{', '.join(foreign)}: of a {self.name!r} for segmentation and detection alone: leave them out"
            )

    def check_fields(self, fields: Iterable[str]) -> None:
        """Raises a RecipeError that names the fields which models of this kind do not have, and those which do."""
        if foreign := sorted(set(fields) - set(config_fields(self.config_class))):
            owners = [each.name for each in FAMILIES.values() if set(foreign) <= set(config_fields(each.config_class))]
            raise RecipeError(
                f"{', '.join(foreign)}: of model_type {' or '.join(owners) or 'none'}, but the model is a "
                f"{self.name!r}: leave them out, or set model_type, with a recipe for it (--config)"
            )

    def sizes(self, fields: Iterable[str]) -> set[str]:
        """Those fields that must be the checkpoint's; the rest may be set for any."""
        return set(fields) - {*self.free_fields, *self.dense_fields}

    def build_config(
        self, preset: str | None, fields: Mapping[str, Any], *, is_dense: bool = False, **labels: Any
    ) -> PreTrainedConfig:
        """The configuration of a preset's sizes, or of the class's defaults, with these fields on top.

        Raises:
            RecipeError: a field or a preset that models of this kind do not have, or see `check_task`.
            ValueError: an unknown preset, or fields that the configuration refuses.
        """
        self.check_fields(fields)
        self.check_task(fields, is_dense)
        owners = [each.name for each in FAMILIES.values() if preset in each.config_class.presets]
        if owners and self.name not in owners:
            raise RecipeError(f"preset {preset!r} is of model_type {owners[0]!r}, not {self.name!r}: set model_type")
        make = self.config_class if preset is None else lambda **rest: self.config_class.preset(preset, **rest)
        return make(**fields, **labels)


def _stock_vit_fields(fields: Mapping[str, Any], is_classifier: bool) -> dict[str, Any]:
    """The stock classifier knows the class token alone."""
    return {"classifier_pooling": "cls"} if is_classifier else {}


def _stock_swin_fields(fields: Mapping[str, Any], is_classifier: bool) -> dict[str, Any]:
    """Nothing is masked downstream: units are as small as they may be, and divide every image that the model takes."""
    stride = fields["patch_size"] * 2 ** (len(fields["depths"]) - 1)
    return {"encoder_stride": stride, "mask_patch_size": stride}


MIMAE = Family(
    config_class=MIMAEConfig,
    encoder_class=MIMAEModel,
    pretraining_class=MIMAEForPreTraining,
    classification_class=MIMAEForImageClassification,
    backbone_class=MIMAEBackbone,
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
    dense_fields=(
        "use_relative_position_bias",
        "use_relative_position_embeddings",
        "window_size",
        "global_attention_indexes",
        "add_fpn",
    ),
    geometry_fields=("image_size",),
    fit_weights=fit_vit_positions,
    stock_fields=_stock_vit_fields,
    poolings={
        "cls": {"latent_pooling": "cls", "classifier_pooling": "cls"},
        "mean": {"latent_pooling": "mean"},
    },
    remark=lambda config: None,
)
MISIMMIM = Family(
    config_class=MISimMIMConfig,
    encoder_class=MISimMIMModel,
    pretraining_class=MISimMIMForPreTraining,
    classification_class=MISimMIMForImageClassification,
    backbone_class=None,
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
        "use_absolute_embeddings",
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
    dense_fields=(),
    geometry_fields=("image_size", "window_size", "mask_patch_size"),
    fit_weights=fit_swin_tables,
    stock_fields=_stock_swin_fields,
    poolings={"mean": {}},
    remark=padding_remark,
)
FAMILIES = {family.name: family for family in (MIMAE, MISIMMIM)}
CONFIG_CLASSES = tuple(family.config_class for family in FAMILIES.values())


def family_named(model_type: str | None) -> Family:
    """The family that a recipe names; MI-MAE's where it names none.

    Raises:
        RecipeError: there is none of that name.
    """
    if model_type is None:
        return MIMAE
    if model_type not in FAMILIES:
        raise RecipeError(f"model_type={model_type!r} is not known; there are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
