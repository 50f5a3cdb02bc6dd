"""MI-MAE's encoder and classifier as timm's `VisionTransformer`, whose parameters have the official MAE's names.

B images, L patches, D width, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

from ..configuration_mimae import MIMAEConfig

# timm's name → our preset of the same sizes
_PRESETS = {
    "vit_base_patch16_224": "vit-base",
    "vit_tiny_patch16_224": "vit-tiny",
    "vit_small_patch16_224": "vit-small",
    "vit_large_patch16_224": "vit-large",
    "vit_huge_patch14_224": "vit-huge",
}
_TIMM_EPS = 1e-6
_NOT_IN_TIMM = ("decoder_", "mask_token")


@dataclass(frozen=True)
class TimmArchitecture:
    """What `timm.create_model` needs: its nearest name, and the arguments in which the model differs from it.

    The number of classes is always among `arguments`: timm's own depends on the name.
    `layer_norm_eps` stands apart from `arguments`: timm takes a class there, which no JSON file holds.
    """

    name: str
    arguments: dict[str, Any]
    layer_norm_eps: float

    @property
    def has_timm_eps(self) -> bool:
        return self.layer_norm_eps == _TIMM_EPS

    def create(self, **more: Any) -> nn.Module:
        """The model, in evaluation mode; `checkpoint_path` among `more` is loaded strictly."""
        if not self.has_timm_eps:
            more["norm_layer"] = partial(nn.LayerNorm, eps=self.layer_norm_eps)
        return timm.create_model(self.name, **self.arguments, **more).eval()

    def usage(self, path: str) -> str:
        """Python text that creates the model from a file of parameters."""
        arguments = [f"{name}={value!r}" for name, value in self.arguments.items()]
        imports = "import timm\n"
        if not self.has_timm_eps:
            arguments.append(f"norm_layer=partial(torch.nn.LayerNorm, eps={self.layer_norm_eps!r})")
            imports = "from functools import partial\n\nimport timm\nimport torch\n"
        call = ", ".join([repr(self.name), f"checkpoint_path={path!r}", *arguments])
        return f"{imports}\nmodel = timm.create_model({call})"


def timm_architecture(config: MIMAEConfig, *, has_classifier: bool) -> TimmArchitecture:
    """How timm builds the encoder, or the classifier, of this configuration."""
    averages = has_classifier and config.classifier_pooling == "mean"
    wanted = {**vit_sizes(config), "global_pool": "avg" if averages else "token"}
    standard = {
        name: {**vit_sizes(MIMAEConfig.preset(preset)), "global_pool": "token"} for name, preset in _PRESETS.items()
    }

    def differing(name: str) -> dict[str, Any]:
        return {key: value for key, value in wanted.items() if standard[name][key] != value}

    nearest = min(standard, key=lambda name: len(differing(name)))
    arguments = {"num_classes": config.num_labels if has_classifier else 0, **differing(nearest)}
    return TimmArchitecture(nearest, arguments, config.layer_norm_eps)


def timm_state(official: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters under the official MAE's names, without its decoder."""
    return {name: value for name, value in official.items() if not name.startswith(_NOT_IN_TIMM)}


def vit_sizes(config: MIMAEConfig) -> dict[str, Any]:
    """Sizes of an encoder, by the names that timm and detectron2 share; `img_size` is (height, width)."""
    return {
        "img_size": config.image_size_2d,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "qkv_bias": config.qkv_bias,
    }
