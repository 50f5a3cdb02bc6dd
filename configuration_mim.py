"""What the configurations of MI-MAE and MI-SimMIM share: how images are masked, and the information terms.

Symbols are the paper's (MI-MAE, ICLR 2025); defaults are its ImageNet recipe.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from .masking import complete_num_masks, num_visible_patches

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    class _EncoderConfig(PreTrainedConfig):
        """What the fields below are mixed into: the configuration of an encoder in transformers."""

        image_size: int | list[int] | tuple[int, int] = 224
        num_channels: int = 3
        hidden_size: int = 768
        num_labels: int = 2
        id2label: dict[int, str] = field(default_factory=dict)  # transformers fills it in
else:
    _EncoderConfig = object


@dataclass(kw_only=True)
class MIMConfigMixin(_EncoderConfig):
    """Fields, derived sizes and checks of a model that sees each image through N masks.

    A mask has one entry for each *unit* of the image: a patch in MI-MAE, a block of patches in MI-SimMIM.

    Args:
        mask_ratio: r, the fraction of units that each mask removes (Sec. 5.1).
        num_masks: N, views per image; None = complete masking, N = max(2, ceil(1 / (1 - r))) (Sec. 5.3).
        mask_strategy: "orthogonal" cuts all masks of an image from one permutation, "independent" draws one
            permutation for each mask (Table 3c).
        norm_pix_loss: reconstruct each unit normalised by its own mean and variance.
        reconstruction_weight: λ1, of L_rec (Eq. 11).
        mi_max_weight: λ2, of L_max (Eq. 8).
        mi_min_weight: λ3, of L_min (Eq. 10); 0 builds no approximator V.
        temperature: τ, of the similarities in L_max (Eq. 7).
        mi_gate_threshold: ε_l, of Assumption 3: the information terms count once L_rec has been below it;
            None = from the first step (ablation (c) needs it).
        mi_gate_mode: "latch" stays open once opened; "step" decides at each step.
        mi_ramp_steps: passes of training in which the terms' weights grow to λ2 and λ3 once the gate opens; 0 = none.
        approximator_unit: what V sees as X: the "pooled" visible patches of a view, or each "token" (a mixture's
            mean log-likelihood).
        approximator_hidden_size: H, the width of V's hidden layer; None = `hidden_size`.
        approximator_variance_eps: what is added to V's variance.
        train_approximator: False is ablation (d): V stays as initialised and L_approx leaves the loss.
        mi_reduction: "mean" or "sum" over the features of ẑ in L_min and L_approx. With λ3 = 10 a sum over 768
            features would swamp the other terms.
        gather_negatives: whether the other processes' views serve as negatives, too.
    """

    mask_ratio: float = 0.75
    num_masks: int | None = 4
    mask_strategy: Literal["orthogonal", "independent"] = "orthogonal"
    norm_pix_loss: bool = True
    reconstruction_weight: float | int = 1.0
    mi_max_weight: float | int = 1.0
    mi_min_weight: float | int = 10.0
    temperature: float | int = 0.07
    mi_gate_threshold: float | int | None = 0.5
    mi_gate_mode: Literal["latch", "step"] = "latch"
    mi_ramp_steps: int = 0
    approximator_unit: Literal["pooled", "token"] = "pooled"
    approximator_hidden_size: int | None = None
    approximator_variance_eps: float = 1e-2
    train_approximator: bool = True
    mi_reduction: Literal["mean", "sum"] = "mean"
    gather_negatives: bool = True

    # name → fields of a standard size
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]
    # the field that is the side of a unit in pixels
    unit_field: ClassVar[str]

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The configuration of a standard size, with `overrides` on top.

        Raises:
            ValueError: no such preset.
        """
        if name not in cls.presets:
            raise ValueError(f"no preset {name!r}; there are {', '.join(cls.presets)}")
        return cls(**{**cls.presets[name], **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """As in transformers; of a stock checkpoint's configuration everything is taken but its `model_type`.

        transformers would keep it on the instance, and rename the checkpoint's weights by another model's rules.
        """
        return super().from_dict({**config_dict, "model_type": cls.model_type}, **kwargs)

    @property
    def image_size_2d(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def unit_size(self) -> int:
        """Side in pixels of what one entry of a mask stands for."""
        return getattr(self, self.unit_field)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Units per column and per row, (h, w)."""
        height, width = self.image_size_2d
        return height // self.unit_size, width // self.unit_size

    @property
    def num_patches(self) -> int:
        """L, the entries of a mask."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_views(self) -> int:
        """N, also where `num_masks` is None."""
        return complete_num_masks(self.mask_ratio) if self.num_masks is None else self.num_masks

    @property
    def num_visible(self) -> int:
        """V, the units that each mask leaves visible at `image_size`."""
        return num_visible_patches(self.num_patches, self.mask_ratio, self.num_masks)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of one image's mask noise: (L,), or (N, L) for independent masks."""
        return self.noise_shape_of(self.num_patches)

    def noise_shape_of(self, num_patches: int) -> tuple[int, ...]:
        """`noise_shape` for an image of so many units."""
        return (num_patches,) if self.mask_strategy == "orthogonal" else (self.num_views, num_patches)

    def validate_image_size(self) -> None:
        """Part of `@strict`'s validation: units divide the image."""
        if not isinstance(self.image_size, int) and len(self.image_size) != 2:
            raise ValueError(f"image_size={self.image_size} must be a number of pixels, or (height, width)")
        unit = self.unit_size
        if not isinstance(unit, int) or unit < 1:
            raise ValueError(f"{self.unit_field}={unit} must be one whole number of pixels (squares)")
        if any(side < 1 or side % unit for side in self.image_size_2d):
            nearest = [max(1, round(side / unit)) * unit for side in self.image_size_2d]
            raise ValueError(
                f"image_size={self.image_size} is not divisible by {self.unit_field}={unit}; "
                f"the nearest that is: {nearest[0]} x {nearest[1]}"
            )

    def validate_masking(self) -> None:
        """Part of `@strict`'s validation: every mask leaves visible and masked units."""
        self.validate_image_size()  # validators run in no order of ours, and a bad size is no matter of the mask ratio
        if not 0 < self.mask_ratio < 1:
            raise ValueError(
                f"mask_ratio={self.mask_ratio} must lie strictly between 0 (nothing is masked) and 1 (all is)"
            )
        if self.num_masks is not None and self.num_masks < 1:
            raise ValueError(f"num_masks={self.num_masks} must be at least 1, or None for complete masking")
        num_visible_patches(self.num_patches, self.mask_ratio, self.num_masks)

    def validate_information_terms(self) -> None:
        """Part of `@strict`'s validation: the weights, and what they need."""
        for name in ("reconstruction_weight", "mi_max_weight", "mi_min_weight", "mi_ramp_steps"):
            if not 0 <= getattr(self, name) < math.inf:  # so written, it refuses NaN
                raise ValueError(f"{name}={getattr(self, name)} must be finite and not be negative")
        if self.num_masks == 1 and (self.mi_max_weight > 0 or self.mi_min_weight > 0):
            raise ValueError(
                f"mi_max_weight={self.mi_max_weight} and mi_min_weight={self.mi_min_weight} compare several views of "
                "an image, but num_masks=1 makes one; set both weights to 0 (plain masked image modelling), or "
                "num_masks to 2 or more"
            )
        for name in ("temperature", "approximator_variance_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and positive")
