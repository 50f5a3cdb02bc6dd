"""What a kind of model is to the scripts and to the exports: one `Family` says all of it, on a page in `encoders`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_mim import MIMConfigMixin
from ..flags.model_fields import config_fields
from ..flags.option import RecipeError
from ..modeling_mim import MIMEncoderMixin, MIMForImageClassificationMixin, MIMForPreTrainingMixin, MIMPreTrainedMixin

# what every encoder has beside its sizes, called the same in transformers' encoders and in ours
_COMMON_FIELDS = (
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
)
BACKBONE_FIELDS = ("drop_path_rate", *_COMMON_FIELDS)
STOCK_FIELDS = ("image_size", "patch_size", "num_channels", "qkv_bias", *_COMMON_FIELDS)
# what changes how a model is trained, but none of its weights
TRAINING_FIELDS = ("drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps")
StateDict = Mapping[str, torch.Tensor]
# by `model_type`, in the order of registration; `registry` fills it
FAMILIES: "dict[str, Family]" = {}


@dataclass(frozen=True)
class CardWords:
    """What model cards say of a kind of model.

    encoder, baseline, reconstruction: what its encoder is called, what it is without information terms, and L_rec.
    method: how the method is on this encoder; "" = as in the paper.
    vector: what the one vector of an image is: what follows a comma.
    """

    encoder: str
    baseline: str
    reconstruction: str = "L_rec (Eq. 1)"
    method: str = ""
    vector: str = ""


@dataclass(frozen=True, kw_only=True)
class StockModel:
    """transformers' own model, which the encoder and the classifier of a family are, without any code of ours.

    format: what exports and cards call it.
    config_class, encoder_class, classifier_class: its classes.
    fields: of the configuration that it shares with ours.
    encoder_arguments: without which `encoder_class` adds parts of its own, which were never trained.
    left_behind: parameters of our encoder that it has no use for.
    refusal: why it cannot be a model of ours, and what would do; None where it can.
    tokens, pooled: for a card: what its `tokens` are, and Python text of the one vector of an image.
    remark: what else a card says of it.
    """

    format: str
    config_class: type[PreTrainedConfig]
    encoder_class: type[PreTrainedModel]
    classifier_class: type[PreTrainedModel]
    fields: tuple[str, ...]
    encoder_arguments: Mapping[str, Any] = field(default_factory=dict)
    left_behind: tuple[str, ...] = ()
    refusal: Callable[[PreTrainedModel], str | None] = lambda model: None
    tokens: str
    pooled: str
    remark: str = ""

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


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model.

    config_class, encoder_class, pretraining_class, classification_class: its classes.
    backbone_class: the encoder for dense prediction; None where there is none.
    words: what cards call it.
    default_recipe: of the pre-training script: a path, from the package's `recipes` on.
    size_fields: where these differ, a checkpoint's weights do not fit in pre-training.
    free_fields: what a downstream recipe may set although the checkpoint says otherwise.
    dense_fields: the same, of the backbone alone.
    geometry_fields: those of them for which a checkpoint's weights are made to fit, by
    fit_weights: of a state dict, the configuration that it is of, and the model that it is to fit. Raises a ValueError
        where that cannot be.
    head_keys, backbone_keys: what the names of parameters begin with that are new where a checkpoint lacks them, of a
        classifier's head and of a backbone; regular expressions.
    poolings: how a frozen encoder's features may be pooled, the usual way first, each with the fields under which
        they are the encoder's `pooler_output`; under those of the first a classifier sees the same.
    remark: what is worth a line of the log about a configuration, or None.

    pretraining_types, downstream_types: `model_type`s of the checkpoints that pre-training, and another task, can
        start from, its own among them.

    Of the models of others, where there are any:

    stock_config_class: of transformers' own model, whose defaults hold where a checkpoint's config.json is silent.
    stock_fields: what follows from a stock checkpoint's fields, and from whether it is a classifier.
    stock_classes: the classes of transformers whose checkpoints can be exported; ours that take their weights.
    stock: transformers' own model that ours can be exported to.
    formats: what else, by names of `hub.formats`; this project's own goes without saying.
    """

    config_class: type[MIMConfigMixin]
    encoder_class: type[MIMEncoderMixin]
    pretraining_class: type[MIMForPreTrainingMixin]
    classification_class: type[MIMForImageClassificationMixin]
    backbone_class: type[PreTrainedModel] | None = None
    words: CardWords
    default_recipe: str | Path
    pretraining_types: tuple[str, ...]
    downstream_types: tuple[str, ...]
    size_fields: tuple[str, ...]
    free_fields: tuple[str, ...] = ()
    dense_fields: tuple[str, ...] = ()
    geometry_fields: tuple[str, ...] = ()
    fit_weights: Callable[[StateDict, Any, Any], StateDict] = lambda state, there, model: state
    head_keys: tuple[str, ...] = (r"classifier\.",)
    backbone_keys: tuple[str, ...] = ()
    poolings: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"mean": {}})
    remark: Callable[[Any], str | None] = lambda config: None
    stock_config_class: type[PreTrainedConfig] | None = None
    stock_fields: Callable[[Mapping[str, Any], bool], dict[str, Any]] = lambda fields, is_classifier: {}
    stock_classes: Mapping[str, type[MIMPreTrainedMixin]] = field(default_factory=dict)
    stock: StockModel | None = None
    formats: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The `model_type` of its configuration."""
        return self.config_class.model_type

    @property
    def model_classes(self) -> dict[str, type[MIMPreTrainedMixin]]:
        """Those of which there are checkpoints, by name."""
        classes: tuple[type[MIMPreTrainedMixin], ...] = (
            self.encoder_class,
            self.pretraining_class,
            self.classification_class,
        )
        return {each.__name__: each for each in classes}

    def complete(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint's `config.json`, and what it leaves to transformers' own class."""
        defaults = {} if self.stock_config_class is None else self.stock_config_class().to_dict()
        return {**defaults, **saved}

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
    ) -> MIMConfigMixin:
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
