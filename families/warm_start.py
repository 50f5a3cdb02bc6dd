"""Models that start from whatever checkpoint there is: this project's, or a stock model that a family takes.

In pre-training the recipe says how the model is built, and the weights must fit. In a downstream task the checkpoint
says of which family the model is, and how the encoder is built; a recipe may change what touches none of its weights,
and the sizes of images and windows, for which they are made to fit.
"""

import json
import logging
import re
from collections.abc import Mapping
from os import PathLike
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import AutoImageProcessor, PreTrainedConfig, PreTrainedModel

from ..configuration_mim import MIMConfigMixin
from ..data.words import some
from ..flags.model_fields import config_fields
from ..flags.option import RecipeError
from ..modeling_mim import MIMForPreTrainingMixin
from .family import FAMILIES, Family
from .registry import family_named

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=PreTrainedModel)

# fields of a config.json that describe the file, not the model
FILE_FIELDS = ("architectures", "auto_map", "model_type", "transformers_version", "dtype")
LAST_NORM = ("layernorm.weight", "layernorm.bias")


def compare_with_checkpoint(family: Family, config: PreTrainedConfig, path: str) -> list[str]:
    """On a warm start of pre-training the recipe's values win. Says where they differ.

    Raises:
        ValueError: the checkpoint is of another kind of model, or its sizes are not the recipe's; names them.
    """
    saved = PreTrainedConfig.get_config_dict(path)[0]
    kind = saved.get("model_type")
    if kind not in family.pretraining_types:
        fitting = [name for name, other in FAMILIES.items() if kind in other.pretraining_types]
        remedy = f"it starts a model_type: {fitting[0]}" if fitting else "nothing here starts from it"
        raise ValueError(
            f"{path} is a {kind!r} model; with model_type {family.name!r}, --model_name_or_path takes one of "
            f"{family.pretraining_types}; {remedy}"
        )
    # what the checkpoint does not say has the default of transformers' own model, the older of the two layouts
    there = _as_json(family.complete(saved))
    here = _as_json({name: getattr(config, name) for name in config_fields(type(config))})
    differing = [name for name in here if name in there and there[name] != here[name]]
    if clashes := [name for name in differing if name in family.size_fields]:
        words = "; ".join(f"{name}: {there[name]} there, {here[name]} in the recipe" for name in clashes)
        raise ValueError(
            f"the weights of {path} do not fit the recipe's model ({words}); choose its preset or give these values"
        )
    return [f"{name}={here[name]}, the recipe's, not the checkpoint's {there[name]}" for name in differing]


def pretraining_model(
    family: Family, config: PreTrainedConfig, path: str | None, attn_implementation: str | None
) -> MIMForPreTrainingMixin:
    """The model for pre-training: from scratch, or with the weights of a checkpoint; the log names what is new."""
    if path is None:
        config._attn_implementation = attn_implementation
        return family.pretraining_class(config)
    model, info = load_and_tell(family.pretraining_class, path, config=config, attn_implementation=attn_implementation)
    if info["missing_keys"]:
        logger.info("not in %s, and new: %s", path, some(sorted(info["missing_keys"])))
    return model


def load_and_tell(model_class: type[Model], path: str | PathLike[str], **options: Any) -> tuple[Model, dict[str, Any]]:
    """`from_pretrained`, and what it says of the loading, which transformers' annotations do not know."""
    loaded: Any = model_class.from_pretrained(path, output_loading_info=True, **options)
    return loaded


class UnfitCheckpointError(ValueError):
    """A checkpoint that a model cannot be started from; the message says why, and what would do."""


class Checkpoint:
    """A folder or a name on the Hub, and what its `config.json` says.

    Args:
        path: of the checkpoint.

    Raises:
        UnfitCheckpointError: there is no configuration, or the model is of another kind.
    """

    def __init__(self, path: str):
        try:
            self.saved: dict[str, Any] = PreTrainedConfig.get_config_dict(path)[0]
        except OSError as error:
            raise UnfitCheckpointError(
                f"{path} is neither a folder with a config.json nor a model that the Hub gives: "
                f"{str(error).splitlines()[0]}"
            ) from error
        self.path, self.model_type = path, self.saved.get("model_type")
        owners = {name: family for family in FAMILIES.values() for name in family.downstream_types}
        if self.model_type not in owners:
            raise UnfitCheckpointError(
                f"{path} is a {self.model_type!r} model; --model_name_or_path takes one of {tuple(owners)}"
            )
        self.family = owners[self.model_type]
        known = self.family.config_class.__dataclass_fields__.keys() - set(FILE_FIELDS)
        self._fields = {name: value for name, value in self._all_fields().items() if name in known}

    def _all_fields(self) -> dict[str, Any]:
        """What `config.json` says, and of a stock model what it leaves to that model's class."""
        if self.model_type == self.family.name:
            return self.saved
        fields = self.family.complete(self.saved)
        return {**fields, **self.family.stock_fields(fields, self.is_classifier)}

    @property
    def is_classifier(self) -> bool:
        """Whether it has a trained classification head."""
        return any("ForImageClassification" in name for name in self.saved.get("architectures") or ())

    def config(self, overrides: Mapping[str, Any], **labels: Any) -> MIMConfigMixin:
        """The configuration of a model that starts here.

        Args:
            overrides: a recipe's fields of the family's configuration.
            labels: `id2label` and `label2id`, where they are not the checkpoint's.

        Raises:
            RecipeError: a field that models of this family do not have.
            UnfitCheckpointError: the recipe asks for other weights than there are; names the fields.
        """
        self.family.check_fields(overrides)
        there = self._config_there()
        clashes = [
            f"{name}: {getattr(there, name)} there, {value} in the recipe"
            for name, value in overrides.items()
            if name in self.family.sizes(overrides) and _as_json(getattr(there, name)) != _as_json(value)
        ]
        if clashes:
            raise UnfitCheckpointError(
                f"{self.path} is another model than the recipe's ({'; '.join(clashes)}); leave these fields out, or "
                "take another checkpoint"
            )
        return self.family.config_class(**{**self._fields, **overrides, **labels})

    def load(
        self,
        model_class: type[Model],
        config: PreTrainedConfig,
        *,
        attn_implementation: str | None = None,
        with_head: bool = False,
    ) -> Model:
        """The model in float32, with this checkpoint's weights.

        A head is new where it has none that fits; so are a backbone's pyramid and relative positions. The log names
        what is new.

        Args:
            config: from `config`; where its images or windows are of another size, weights are made to fit, and the
                log says so.
            with_head: the head must be the checkpoint's.

        Raises:
            UnfitCheckpointError: a part of the encoder is missing, or of the head where it must be there; a file that
                cannot be read.
            ValueError: weights that cannot be made to fit; see the family's `fit_weights`.
        """
        there = self._config_there()
        geometry = {name: getattr(there, name) for name in self.family.geometry_fields}
        try:
            model, info = load_and_tell(
                model_class,
                self.path,
                config=self.family.config_class.from_dict({**config.to_dict(), **geometry}),
                attn_implementation=attn_implementation,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # a classifier of other classes
            )
        except SafetensorError as error:
            raise UnfitCheckpointError(f"the weights of {self.path} cannot be read: {error}") from error
        unfit = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
        of_head, of_backbone = (
            [key for key in unfit if any(re.match(each, key) for each in patterns)]
            for patterns in (self.family.head_keys, self.family.backbone_keys)
        )
        if lacking := unfit if with_head else [key for key in unfit if key not in of_head + of_backbone]:
            hint = (
                ". (A classifier on averaged patches has no last LayerNorm: take the checkpoint that it was made from)"
                if all(key.endswith(LAST_NORM) for key in lacking)
                else ""
            )
            raise UnfitCheckpointError(
                f"{self.path} lacks some weights, or has them in another shape: {some(lacking)}{hint}"
            )
        if of_head:
            logger.info("%s has no head that fits: a new one starts from random weights", self.path)
        if any(_as_json(getattr(config, name)) != _as_json(value) for name, value in geometry.items()):
            config._attn_implementation = model.config._attn_implementation
            state, model = model.state_dict(), model_class(config)
            model.load_state_dict(self.family.fit_weights(state, there, model))
        if of_backbone:
            names = sorted({re.sub(r"\.\d+\.", ".*.", key) for key in of_backbone})
            logger.info("new, as %s has no weights for it: %s", self.path, ", ".join(names))
        return model

    def _config_there(self) -> MIMConfigMixin:
        """The checkpoint's own."""
        return self.family.config_class(**self._fields)

    def channel_statistics(self) -> tuple[list[float] | None, list[float] | None]:
        """Mean and standard deviation that it was trained with, from its image processor; None where it has none."""
        try:
            processor = AutoImageProcessor.from_pretrained(self.path)
        except (OSError, ValueError):
            logger.info("%s has no image processor: the mean and deviation of its images are not known", self.path)
            return None, None
        return list(processor.image_mean), list(processor.image_std)


def _as_json(value: Any) -> Any:
    """As a file would hold it: lists and tuples are the same, and so are 4 and 4.0."""
    return json.loads(json.dumps(value))


class StartingModel:
    """The family that the flags choose, and the models of it that a task needs.

    Args:
        path: of a checkpoint, which then says how the model is built.
        model_type: of the family; None = the checkpoint's, or MI-MAE's where there is none.
        preset: a size, where there is no checkpoint.
        fields: of the model's configuration, as a recipe has them.
        is_dense: whether the task needs a backbone.

    Raises:
        RecipeError: path, model type and preset contradict each other, or do not suit the task.
        UnfitCheckpointError: see `Checkpoint`.
    """

    def __init__(
        self,
        path: str | None,
        *,
        model_type: str | None,
        preset: str | None,
        fields: Mapping[str, Any],
        is_dense: bool = False,
    ):
        if path is not None and preset is not None:
            raise RecipeError(f"--model_name_or_path {path} says how the model is built: leave --preset out")
        self.preset, self.fields, self.is_dense = preset, fields, is_dense
        self.checkpoint = None if path is None else Checkpoint(path)
        self.family = family_named(model_type)
        if self.checkpoint is not None:
            if model_type is not None and self.checkpoint.family is not self.family:
                raise RecipeError(
                    f"model_type={model_type!r}, but {path} is a {self.checkpoint.model_type!r} model: leave "
                    "model_type out, or take another checkpoint"
                )
            self.family = self.checkpoint.family
        self.family.check_task(fields, is_dense)

    def config(self, labels: Mapping[str, Any] | None = None, **overrides: Any) -> MIMConfigMixin:
        """The checkpoint's configuration, or that of the recipe alone, with the recipe's fields and these on top.

        Raises:
            ValueError: there is no checkpoint, no preset and no field that says how large a model is; see also
                `Checkpoint.config` and `Family.build_config`.
        """
        fields, labels = {**self.fields, **overrides}, labels or {}
        if self.checkpoint is not None:
            return self.checkpoint.config(fields, **labels)
        if self.preset is None and not self.family.sizes(self.fields) & set(self.family.size_fields):
            raise ValueError("there is no model: give --model_name_or_path, or --preset to train one from scratch")
        return self.family.build_config(self.preset, fields, is_dense=self.is_dense, **labels)

    def load(
        self,
        model_class: type[Model],
        config: PreTrainedConfig,
        *,
        untrained: bool = False,
        attn_implementation: str | None = None,
        with_head: bool = False,
    ) -> Model:
        """The model with the checkpoint's weights, its head too if it must be there, or with random ones.

        Raises:
            ValueError: see `Checkpoint.load`.
        """
        if self.checkpoint is not None and not untrained:
            return self.checkpoint.load(
                model_class, config, attn_implementation=attn_implementation, with_head=with_head
            )
        logger.info("the model starts from random weights")
        config._attn_implementation = attn_implementation
        return model_class(config)
