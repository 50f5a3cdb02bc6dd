"""transformers' own models, which the encoder and the classifier of this project are, without any code of it.

A stock Swin differs from ours, which is as the official one, in two things. It drops paths in the attention branch
alone, which matters where it is trained further. And it shifts the windows of a stage that has a single one at the
configuration's image size, until it has seen an image of that size: only then do features of larger images agree.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)


@dataclass(frozen=True)
class StockModel:
    """How transformers builds a model of ours.

    config_class, encoder_class, classifier_class: its classes.
    fields: of the configuration that it shares with ours.
    encoder_arguments: without which `encoder_class` adds parts of its own, which were never trained.
    left_behind: parameters of our encoder that it has no use for.
    """

    config_class: type[PreTrainedConfig]
    encoder_class: type[PreTrainedModel]
    classifier_class: type[PreTrainedModel]
    fields: tuple[str, ...]
    encoder_arguments: Mapping[str, Any] = field(default_factory=dict)
    left_behind: tuple[str, ...] = ()

    def create(self, model: PreTrainedModel, *, has_classifier: bool) -> PreTrainedModel:
        """The same as our model, or as its encoder alone."""
        fields = {name: getattr(model.config, name) for name in self.fields}
        if has_classifier:
            labels = {name: getattr(model.config, name) for name in ("id2label", "label2id")}
            stock = self.classifier_class(self.config_class(**fields, **labels))
            stock.load_state_dict(model.state_dict())
        else:
            stock = self.encoder_class(self.config_class(**fields), **self.encoder_arguments)
            state = model.base_model.state_dict()
            stock.load_state_dict({name: state[name] for name in state if name not in self.left_behind})
        return stock

    def load(self, folder: Path, *, has_classifier: bool) -> PreTrainedModel:
        """From a folder, in evaluation mode."""
        stock_class, arguments = self._loader(has_classifier)
        return stock_class.from_pretrained(folder, **arguments).eval()

    def usage(self, folder: Path, *, has_classifier: bool) -> str:
        """Python text that does so."""
        stock_class, arguments = self._loader(has_classifier)
        name = stock_class.__name__
        call = ", ".join([repr(str(folder)), *(f"{key}={value!r}" for key, value in arguments.items())])
        return f"from transformers import {name}\n\nmodel = {name}.from_pretrained({call})"

    def _loader(self, has_classifier: bool) -> tuple[type[PreTrainedModel], Mapping[str, Any]]:
        return (self.classifier_class, {}) if has_classifier else (self.encoder_class, self.encoder_arguments)


_SHARED_FIELDS = (
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
)
_VIT = StockModel(
    config_class=ViTConfig,
    encoder_class=ViTModel,
    classifier_class=ViTForImageClassification,
    fields=(*_SHARED_FIELDS, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    encoder_arguments={"add_pooling_layer": False},
)
_SWIN = StockModel(
    config_class=SwinConfig,
    encoder_class=SwinModel,
    classifier_class=SwinForImageClassification,
    fields=(
        *_SHARED_FIELDS,
        *("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "drop_path_rate", "encoder_stride"),
    ),
    left_behind=("embeddings.mask_token",),
)
# model_type of ours → transformers' own
STOCK_MODELS = {"mimae": _VIT, "misimmim": _SWIN}
