"""Configuration of MI-MAE. Symbols are the paper's (MI-MAE, ICLR 2025); defaults are its ImageNet recipe."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import ViTMAEConfig

from .masking import complete_num_masks, num_visible_patches

# width, blocks, heads of the encoder; width, blocks, heads of the decoder; patch size. Base, large and huge are the
# official MAE's; small is the paper's (384 wide, 12 heads, 8 blocks); tiny follows small. MLPs are 4 times as wide.
_PRESETS = {
    "vit-tiny": ((192, 12, 3), (192, 8, 6), 16),
    "vit-small": ((384, 12, 6), (384, 8, 12), 16),
    "vit-base": ((768, 12, 12), (512, 8, 16), 16),
    "vit-large": ((1024, 24, 16), (512, 8, 16), 16),
    "vit-huge": ((1280, 32, 16), (512, 8, 16), 14),
}
_MLP_RATIO = 4


@strict
class MIMAEConfig(ViTMAEConfig):
    """What a `MIMAEModel` or a `MIMAEForPreTraining` is made of. Every field of `ViTMAEConfig` is one here too.

    With `num_masks=1, mi_max_weight=0, mi_min_weight=0` the model is MAE and nothing else.

    Args:
        image_size: side in pixels, or (height, width); multiples of `patch_size`.
        mask_ratio: r, the fraction of patches that each mask removes (Sec. 5.1).
        num_masks: N, views per image; None = complete masking, N = max(2, ceil(1 / (1 - r))) (Sec. 5.3).
        mask_strategy: "orthogonal" cuts all masks of an image from one permutation, "independent" draws one
            permutation for each mask (Table 3c).
        norm_pix_loss: reconstruct each patch normalised by its own mean and variance. True, other than in ViTMAE:
            the official command sets it, and ε_l = 0.5 only makes sense with it.
        reconstruction_weight: λ1 of Eq. 11.
        mi_max_weight: λ2, of L_max (Eq. 8).
        mi_min_weight: λ3, of L_min (Eq. 10); 0 builds no approximator V.
        temperature: τ of Eq. 7.
        mi_gate_threshold: ε_l of Assumption 3: the information terms count once L_rec has been below it;
            None = from the first step (ablation (c) needs it).
        mi_gate_mode: "latch" stays open once opened; "step" decides at each step.
        latent_pooling: how the tokens of a view become its one vector ẑ: "mean" of the visible patches, "cls" token,
            or mean of "all".
        approximator_unit: what V sees as X: the "pooled" visible patches of a view, or each "token" (a mixture's
            mean log-likelihood).
        approximator_hidden_size: H of V; None = `hidden_size`.
        approximator_variance_eps: added to V's variance.
        train_approximator: False is ablation (d): V stays as initialised and L_approx leaves the loss.
        mi_reduction: over the features of ẑ in L_min and L_approx, "mean" or "sum". With λ3 = 10 a sum over 768
            features would swamp the other terms.
        gather_negatives: whether the other processes' views serve as negatives, too.
        drop_path_rate: of the last block; a block's residual branches are dropped at a rate that grows linearly from
            0 in the first one. For fine-tuning; MAE pre-trains without.
        classifier_pooling: what the classifier sees: the "mean" of the patch tokens, through a LayerNorm of its own
            in place of the encoder's last, or the class token ("cls") after the encoder's last.

    Raises:
        StrictDataclassError (of huggingface_hub): a wrong type, or values that contradict each other; the message
            names the field and what would be right.
    """

    model_type = "mimae"

    layer_norm_eps: float = 1e-6
    norm_pix_loss: bool = True
    num_masks: int | None = 4
    mask_strategy: Literal["orthogonal", "independent"] = "orthogonal"
    reconstruction_weight: float | int = 1.0
    mi_max_weight: float | int = 1.0
    mi_min_weight: float | int = 10.0
    temperature: float | int = 0.07
    mi_gate_threshold: float | int | None = 0.5
    mi_gate_mode: Literal["latch", "step"] = "latch"
    latent_pooling: Literal["mean", "cls", "all"] = "mean"
    approximator_unit: Literal["pooled", "token"] = "pooled"
    approximator_hidden_size: int | None = None
    approximator_variance_eps: float = 1e-2
    train_approximator: bool = True
    mi_reduction: Literal["mean", "sum"] = "mean"
    gather_negatives: bool = True
    drop_path_rate: float | int = 0.0
    classifier_pooling: Literal["mean", "cls"] = "mean"

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "MIMAEConfig":
        """The configuration of a standard size, "vit-tiny" to "vit-huge", with `overrides` on top.

        Raises:
            ValueError: no such preset.
        """
        if name not in _PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(_PRESETS)}")
        (width, depth, heads), (decoder_width, decoder_depth, decoder_heads), patch_size = _PRESETS[name]
        sizes = {
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "intermediate_size": _MLP_RATIO * width,
            "decoder_hidden_size": decoder_width,
            "decoder_num_hidden_layers": decoder_depth,
            "decoder_num_attention_heads": decoder_heads,
            "decoder_intermediate_size": _MLP_RATIO * decoder_width,
            "patch_size": patch_size,
        }
        return cls(**{**sizes, **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "MIMAEConfig":
        """As in transformers; of a ViTMAE checkpoint's configuration everything is taken but its `model_type`.

        transformers would keep it on the instance, and rename the checkpoint's weights by another model's rules.
        """
        return super().from_dict({**config_dict, "model_type": cls.model_type}, **kwargs)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches per column and per row, (h, w)."""
        height, width = self.image_size_2d
        return height // self.patch_size, width // self.patch_size

    @property
    def image_size_2d(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def num_patches(self) -> int:
        """L."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_views(self) -> int:
        """N, also where `num_masks` is None."""
        return complete_num_masks(self.mask_ratio) if self.num_masks is None else self.num_masks

    @property
    def num_visible(self) -> int:
        """V, the patches that each mask leaves visible at `image_size`."""
        return num_visible_patches(self.num_patches, self.mask_ratio, self.num_masks)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of one image's mask noise: (L,), or (N, L) for independent masks."""
        shape = (self.num_patches,)
        return shape if self.mask_strategy == "orthogonal" else (self.num_views, *shape)

    def validate_sizes(self):
        """Part of `@strict`'s validation: image, patches and heads fit each other."""
        if not isinstance(self.patch_size, int) or self.patch_size < 1:
            raise ValueError(f"patch_size={self.patch_size} must be one whole number of pixels (square patches)")
        if not isinstance(self.image_size, int) and len(self.image_size) != 2:
            raise ValueError(f"image_size={self.image_size} must be a number of pixels, or (height, width)")
        if any(side < 1 or side % self.patch_size for side in self.image_size_2d):
            nearest = [max(1, round(side / self.patch_size)) * self.patch_size for side in self.image_size_2d]
            raise ValueError(
                f"image_size={self.image_size} is not divisible by patch_size={self.patch_size}; "
                f"the nearest that is: {nearest[0]} x {nearest[1]}"
            )
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

    def validate_masking(self):
        """Part of `@strict`'s validation: every mask leaves visible and masked patches."""
        self.validate_sizes()  # validators run in alphabetical order, and a bad size is no matter of the mask ratio
        if not 0 < self.mask_ratio < 1:
            raise ValueError(
                f"mask_ratio={self.mask_ratio} must lie strictly between 0 (nothing is masked) and 1 (all is)"
            )
        if self.num_masks is not None and self.num_masks < 1:
            raise ValueError(f"num_masks={self.num_masks} must be at least 1, or None for complete masking")
        num_visible_patches(self.num_patches, self.mask_ratio, self.num_masks)

    def validate_information_terms(self):
        """Part of `@strict`'s validation: the weights, and what they need."""
        for name in ("reconstruction_weight", "mi_max_weight", "mi_min_weight"):
            if not 0 <= getattr(self, name) < math.inf:  # so written, it refuses NaN
                raise ValueError(f"{name}={getattr(self, name)} must be finite and not be negative")
        if self.num_masks == 1 and (self.mi_max_weight > 0 or self.mi_min_weight > 0):
            raise ValueError(
                f"mi_max_weight={self.mi_max_weight} and mi_min_weight={self.mi_min_weight} compare several views of "
                "an image, but num_masks=1 makes one; set both weights to 0 (plain MAE), or num_masks to 2 or more"
            )
        for name in ("temperature", "approximator_variance_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and positive")
