"""Configuration of MI-SimMIM: the same method on Swin. Defaults are SimMIM's Swin-B with the paper's masks."""

from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import SwinConfig

from .configuration_mim import MIMConfigMixin


def _swin_sizes(width: int, depths: tuple[int, ...], heads: tuple[int, ...]) -> dict[str, Any]:
    return {"embed_dim": width, "depths": depths, "num_heads": heads}


@strict
class MISimMIMConfig(MIMConfigMixin, SwinConfig):
    """What a `MISimMIMForPreTraining` is made of. Every field of `SwinConfig` is one here too.

    How images are masked and what the information terms are: see `MIMConfigMixin`, whose units are blocks of
    `mask_patch_size` pixels here. With `num_masks=1, mi_max_weight=0, mi_min_weight=0` the model is SimMIM and nothing
    else. Pixels are reconstructed as they are (`norm_pix_loss=False`) by their absolute error; for that loss the paper
    names no ε_l of its own, and 0.5 is its only figure.

    Args:
        image_size: side in pixels, or (height, width); multiples of `mask_patch_size`.
        patch_size: side in pixels of a patch.
        embed_dim: width of the first stage's tokens; each stage doubles it.
        depths: blocks of each stage.
        num_heads: heads in each block of each stage.
        mlp_ratio: width of the MLPs, over that of the tokens.
        window_size: tokens per side of an attention window; the map of the last stage must hold one.
        hidden_act: activation function of the MLPs, as transformers calls it.
        encoder_stride: pixels per side of a token of the last stage; follows from patches and stages.
        mask_patch_size: side in pixels of a mask's unit, a multiple of `encoder_stride`, so that every token of the
            last stage is wholly visible or wholly masked.
        drop_path_rate: of the last block; a block's residual branches are dropped at a rate that grows linearly from
            0 in the first one. For fine-tuning; pre-training goes without.

    Raises:
        StrictDataclassError (of huggingface_hub): a wrong type, or values that contradict each other; the message
            names the field and what would be right.
    """

    model_type = "misimmim"
    unit_field: ClassVar[str] = "mask_patch_size"
    # Sec. 4 of the Swin paper (Liu et al. 2021)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "swin-tiny": _swin_sizes(96, (2, 2, 6, 2), (3, 6, 12, 24)),
        "swin-small": _swin_sizes(96, (2, 2, 18, 2), (3, 6, 12, 24)),
        "swin-base": _swin_sizes(128, (2, 2, 18, 2), (4, 8, 16, 32)),
        "swin-large": _swin_sizes(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    }

    if TYPE_CHECKING:  # `validate_sizes` sees to it
        patch_size: int = 4
    image_size: int | list[int] | tuple[int, int] = 192
    window_size: int = 6
    embed_dim: int = 128
    depths: list[int] | tuple[int, ...] = (2, 2, 18, 2)
    num_heads: list[int] | tuple[int, ...] = (4, 8, 16, 32)
    drop_path_rate: float | int = 0.0
    mask_patch_size: int = 32
    mask_ratio: float = 0.5
    num_masks: int | None = 2
    norm_pix_loss: bool = False

    def validate_sizes(self) -> None:
        """Part of `@strict`'s validation: patches, stages, windows and heads fit each other."""
        self.validate_image_size()
        if not isinstance(self.patch_size, int) or self.patch_size < 1:
            raise ValueError(f"patch_size={self.patch_size} must be one whole number of pixels (square patches)")
        if not self.depths or len(self.depths) != len(self.num_heads):
            raise ValueError(f"depths={self.depths} and num_heads={self.num_heads} must each have one number a stage")
        if min(*self.depths, *self.num_heads) < 1:
            raise ValueError(f"depths={self.depths} and num_heads={self.num_heads} must be at least 1 in each stage")
        stride = self.patch_size * 2 ** (len(self.depths) - 1)
        if self.encoder_stride != stride:
            raise ValueError(
                f"encoder_stride={self.encoder_stride} must be {stride}: patches of {self.patch_size} pixels, doubled "
                f"between {len(self.depths)} stages"
            )
        if self.mask_patch_size % stride:
            raise ValueError(f"mask_patch_size={self.mask_patch_size} must be a multiple of encoder_stride={stride}")
        last_map = [side // stride for side in self.image_size_2d]
        if not 1 <= self.window_size <= min(last_map):
            raise ValueError(
                f"window_size={self.window_size} must lie in 1..{min(last_map)}: the last stage sees {last_map[0]} x "
                f"{last_map[1]} tokens of image_size={self.image_size}"
            )
        for stage, heads in enumerate(self.num_heads):
            width = self.embed_dim * 2**stage
            if width % heads:
                raise ValueError(f"num_heads={self.num_heads}: {heads} do not divide the {width} of stage {stage + 1}")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={self.drop_path_rate} must lie in 0..1, below 1")

    def validate_positions(self) -> None:
        """Part of `@strict`'s validation: SimMIM's Swin has relative positions alone."""
        if self.use_absolute_embeddings:
            raise ValueError(
                "use_absolute_embeddings=True: SimMIM's Swin has relative positions alone; leave it False"
            )
