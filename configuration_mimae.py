"""Configuration of MI-MAE. Symbols are the paper's (MI-MAE, ICLR 2025); defaults are its ImageNet recipe."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import ViTMAEConfig

from .configuration_mim import MIMConfigMixin


def _vit_sizes(encoder: tuple[int, int, int], decoder: tuple[int, int, int], patch_size: int) -> dict[str, int]:
    """Fields of a ViT whose encoder and decoder have this (width, blocks, heads); MLPs are 4 times as wide."""
    (width, depth, heads), (decoder_width, decoder_depth, decoder_heads) = encoder, decoder
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "decoder_hidden_size": decoder_width,
        "decoder_num_hidden_layers": decoder_depth,
        "decoder_num_attention_heads": decoder_heads,
        "decoder_intermediate_size": 4 * decoder_width,
        "patch_size": patch_size,
    }


@strict
class MIMAEConfig(MIMConfigMixin, ViTMAEConfig):
    """What a `MIMAEModel` or a `MIMAEForPreTraining` is made of. Every field of `ViTMAEConfig` is one here too.

    How images are masked and what the information terms are: see `MIMConfigMixin`, whose units are patches here. With
    `num_masks=1, mi_max_weight=0, mi_min_weight=0` the model is MAE and nothing else. `norm_pix_loss` is True, other
    than in ViTMAE: the official command sets it, and ε_l = 0.5 only makes sense with it.

    Args:
        image_size: side in pixels, or (height, width); multiples of `patch_size`.
        latent_pooling: how the tokens of a view become its one vector ẑ: "mean" of the visible patches, "cls" token,
            or mean of "all".
        drop_path_rate: of the last block; a block's residual branches are dropped at a rate that grows linearly from
            0 in the first one. For fine-tuning; MAE pre-trains without.
        classifier_pooling: what the classifier sees: the "mean" of the patch tokens, through a LayerNorm of its own
            in place of the encoder's last, or the class token ("cls") after the encoder's last.

    Raises:
        StrictDataclassError (of huggingface_hub): a wrong type, or values that contradict each other; the message
            names the field and what would be right.
    """

    model_type = "mimae"
    unit_field: ClassVar[str] = "patch_size"
    # Base, large and huge are the official MAE's; small is the paper's (384 wide, 12 heads, 8 blocks)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "vit-tiny": _vit_sizes((192, 12, 3), (192, 8, 6), 16),
        "vit-small": _vit_sizes((384, 12, 6), (384, 8, 12), 16),
        "vit-base": _vit_sizes((768, 12, 12), (512, 8, 16), 16),
        "vit-large": _vit_sizes((1024, 24, 16), (512, 8, 16), 16),
        "vit-huge": _vit_sizes((1280, 32, 16), (512, 8, 16), 14),
    }

    layer_norm_eps: float = 1e-6
    latent_pooling: Literal["mean", "cls", "all"] = "mean"
    drop_path_rate: float | int = 0.0
    classifier_pooling: Literal["mean", "cls"] = "mean"

    def validate_sizes(self):
        """Part of `@strict`'s validation: widths, heads and positions fit each other."""
        for prefix in ("", "decoder_"):
            width, heads = getattr(self, f"{prefix}hidden_size"), getattr(self, f"{prefix}num_attention_heads")
            if width % heads:
                raise ValueError(
                    f"{prefix}hidden_size={width} is not divisible by {prefix}num_attention_heads={heads}"
                )
            if width % 4:
                raise ValueError(f"{prefix}hidden_size={width} must be a multiple of 4 for 2D sin-cos positions")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={self.drop_path_rate} must lie in 0..1, below 1")
