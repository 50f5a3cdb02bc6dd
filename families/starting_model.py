"""What a downstream task starts from: the weights of a checkpoint, or an architecture alone."""

import logging
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from ..configuration_mim import MIMConfigMixin
from ..flags.option import RecipeError
from .registry import family_named
from .warm_start import Checkpoint, Model

logger = logging.getLogger(__name__)


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
