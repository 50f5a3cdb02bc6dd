"""Models for downstream tasks, started from whatever checkpoint there is: this project's, ViTMAE's, the stock ViT's.

The checkpoint says how the encoder is built. A recipe may change what touches none of its weights, and the image size:
positions are interpolated then.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoImageProcessor, PreTrainedConfig

from ..configuration_mimae import MIMAEConfig
from ..data.words import some
from ..modeling_mimae import MIMAEPreTrainedModel, interpolate_positions

logger = logging.getLogger(__name__)

MODEL_TYPES = ("mimae", "vit_mae", "vit")
# what a recipe may set although the checkpoint says otherwise: it changes the shape of no weight but the positions'
FREE_FIELDS = (
    "image_size",
    "drop_path_rate",
    "classifier_pooling",
    "latent_pooling",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "layer_norm_eps",
)
# fields of a config.json that describe the file, not the model
FILE_FIELDS = ("architectures", "auto_map", "model_type", "transformers_version", "dtype")
HEAD_KEYS = ("classifier.", "fc_norm.")
POSITIONS = "embeddings.position_embeddings"


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
        self.path = path
        if self.saved.get("model_type") not in MODEL_TYPES:
            raise UnfitCheckpointError(
                f"{path} is a {self.saved.get('model_type')!r} model; --model_name_or_path takes one of {MODEL_TYPES}"
            )
        known = MIMAEConfig.__dataclass_fields__.keys() - set(FILE_FIELDS)
        self._fields = {name: value for name, value in self.saved.items() if name in known}
        if self.saved["model_type"] != "mimae" and self.is_classifier:
            self._fields["classifier_pooling"] = "cls"  # the only one that the stock classifier knows

    @property
    def is_classifier(self) -> bool:
        """Whether it has a trained classification head."""
        return any("ForImageClassification" in name for name in self.saved.get("architectures") or ())

    def config(self, overrides: Mapping[str, Any], **labels: Any) -> MIMAEConfig:
        """The configuration of a model that starts here.

        Args:
            overrides: a recipe's fields of `MIMAEConfig`.
            labels: `id2label` and `label2id`, where they are not the checkpoint's.

        Raises:
            UnfitCheckpointError: the recipe asks for other weights than there are; names the fields.
        """
        there = MIMAEConfig(**self._fields)
        clashes = [
            f"{name}: {getattr(there, name)} there, {value} in the recipe"
            for name, value in overrides.items()
            if name not in FREE_FIELDS and getattr(there, name) != value
        ]
        if clashes:
            raise UnfitCheckpointError(
                f"{self.path} is another model than the recipe's ({'; '.join(clashes)}); leave these fields out, or "
                "take another checkpoint"
            )
        return MIMAEConfig(**{**self._fields, **overrides, **labels})

    def load(
        self,
        model_class: type[MIMAEPreTrainedModel],
        config: MIMAEConfig,
        *,
        attn_implementation: str | None = None,
        with_head: bool = False,
    ) -> MIMAEPreTrainedModel:
        """The model in float32, with this checkpoint's weights and a new head where it has none that fits.

        Args:
            config: from `config`; of another image size the positions are interpolated, and the log says so.
            with_head: the head must be the checkpoint's.

        Raises:
            UnfitCheckpointError: a part of the encoder is missing, or of the head where it must be there; a file that
                cannot be read.
        """
        there = MIMAEConfig(**self._fields)
        try:
            model, info = model_class.from_pretrained(
                self.path,
                config=MIMAEConfig.from_dict({**config.to_dict(), "image_size": there.image_size}),
                attn_implementation=attn_implementation,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # a classifier of other classes
                output_loading_info=True,
            )
        except SafetensorError as error:
            raise UnfitCheckpointError(f"the weights of {self.path} cannot be read: {error}") from error
        unfit = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
        if lacking := [key for key in unfit if with_head or not key.startswith(HEAD_KEYS)]:
            raise UnfitCheckpointError(
                f"{self.path} lacks {len(lacking)} weights, or has them in another shape: {some(lacking)}. (A "
                "classifier on averaged patches has no last LayerNorm: take the checkpoint that it was made from)"
            )
        if unfit:
            logger.info("%s has no head that fits: a new one starts from random weights", self.path)
        if there.image_size_2d != config.image_size_2d:
            logger.info(
                "%s was made for images of %d x %d pixels: its positions are interpolated to %d x %d",
                *(self.path, *there.image_size_2d, *config.image_size_2d),
            )
            model = _at_image_size(model, config)
        return model

    def channel_statistics(self) -> tuple[list[float] | None, list[float] | None]:
        """Mean and standard deviation that it was trained with, from its image processor; None where it has none."""
        try:
            processor = AutoImageProcessor.from_pretrained(self.path)
        except (OSError, ValueError):
            logger.info("%s has no image processor: the mean and deviation of its images are not known", self.path)
            return None, None
        return list(processor.image_mean), list(processor.image_std)


def _at_image_size(model: MIMAEPreTrainedModel, config: MIMAEConfig) -> MIMAEPreTrainedModel:
    """The same weights in a model for images of another size."""
    state = model.state_dict()
    key = next(name for name in state if name.endswith(POSITIONS))
    state[key] = interpolate_positions(state[key], model.config.grid_size, config.grid_size)
    config._attn_implementation = model.config._attn_implementation
    resized = type(model)(config)
    resized.load_state_dict(state)
    return resized
