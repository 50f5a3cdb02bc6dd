"""Models for downstream tasks, from whatever checkpoint there is: this project's, ViTMAE's, stock ViT's or Swin's.

The checkpoint says of which family the model is, and how the encoder is built. A recipe may change what touches none
of its weights, and the sizes of images and windows, for which they are made to fit.
"""

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoImageProcessor, PreTrainedConfig, PreTrainedModel

from ..data.words import some
from .geometry import fit_relative_positions
from .registry import FAMILIES

logger = logging.getLogger(__name__)

MODEL_TYPES = tuple(name for family in FAMILIES.values() for name in family.downstream_types)
# fields of a config.json that describe the file, not the model
FILE_FIELDS = ("architectures", "auto_map", "model_type", "transformers_version", "dtype")
HEAD_KEYS = ("classifier.", "fc_norm.")
# of a backbone, beside an encoder's
RELATIVE = re.compile(r"^layers\.\d+\.attention\.relative_position")
BACKBONE_KEYS = re.compile(rf"fpn\.|{RELATIVE.pattern}")
LAST_NORM = ("layernorm.weight", "layernorm.bias")


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
        if self.model_type not in MODEL_TYPES:
            raise UnfitCheckpointError(
                f"{path} is a {self.model_type!r} model; --model_name_or_path takes one of {MODEL_TYPES}"
            )
        self.family = next(family for family in FAMILIES.values() if self.model_type in family.downstream_types)
        known = self.family.config_class.__dataclass_fields__.keys() - set(FILE_FIELDS)
        self._fields = {name: value for name, value in self._all_fields().items() if name in known}

    def _all_fields(self) -> dict[str, Any]:
        """What `config.json` says, and of a stock model what it leaves to that model's class."""
        if self.model_type == self.family.name:
            return self.saved
        fields = {**self.family.stock_config_class().to_dict(), **self.saved}
        return {**fields, **self.family.stock_fields(fields, self.is_classifier)}

    @property
    def is_classifier(self) -> bool:
        """Whether it has a trained classification head."""
        return any("ForImageClassification" in name for name in self.saved.get("architectures") or ())

    def config(self, overrides: Mapping[str, Any], **labels: Any) -> PreTrainedConfig:
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
        model_class: type[PreTrainedModel],
        config: PreTrainedConfig,
        *,
        attn_implementation: str | None = None,
        with_head: bool = False,
    ) -> PreTrainedModel:
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
            ValueError: weights that cannot be made to fit; see `geometry`.
        """
        there = self._config_there()
        geometry = {name: getattr(there, name) for name in self.family.geometry_fields}
        try:
            model, info = model_class.from_pretrained(
                self.path,
                config=self.family.config_class.from_dict({**config.to_dict(), **geometry}),
                attn_implementation=attn_implementation,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # a classifier of other classes
                output_loading_info=True,
            )
        except SafetensorError as error:
            raise UnfitCheckpointError(f"the weights of {self.path} cannot be read: {error}") from error
        unfit = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
        if lacking := [key for key in unfit if with_head or not _may_be_new(key)]:
            hint = (
                ". (A classifier on averaged patches has no last LayerNorm: take the checkpoint that it was made from)"
                if all(key.endswith(LAST_NORM) for key in lacking)
                else ""
            )
            raise UnfitCheckpointError(
                f"{self.path} lacks some weights, or has them in another shape: {some(lacking)}{hint}"
            )
        if any(key.startswith(HEAD_KEYS) for key in unfit):
            logger.info("%s has no head that fits: a new one starts from random weights", self.path)
        new = {key for key in unfit if BACKBONE_KEYS.match(key)}
        if any(_as_json(getattr(config, name)) != _as_json(value) for name, value in geometry.items()):
            config._attn_implementation = model.config._attn_implementation
            state = self.family.fit_weights(model.state_dict(), there, config)
            model = model_class(config)
            shapes = {key: value.shape for key, value in model.state_dict().items()}
            relative = {key: fit_relative_positions(state[key], shapes[key]) for key in state if RELATIVE.search(key)}
            model.load_state_dict({**state, **relative})
        if new:
            names = sorted({re.sub(r"\.\d+\.", ".*.", key) for key in new})
            logger.info("new, as %s has no weights for it: %s", self.path, ", ".join(names))
        return model

    def _config_there(self) -> PreTrainedConfig:
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


def _may_be_new(key: str) -> bool:
    return key.startswith(HEAD_KEYS) or BACKBONE_KEYS.match(key) is not None


def _as_json(value: Any) -> Any:
    """As a file would hold it: lists and tuples are the same, and so are 4 and 4.0."""
    return json.loads(json.dumps(value))
