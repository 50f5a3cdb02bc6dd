"""Configuration of MI-MAE. Symbols are the paper's (MI-MAE, ICLR 2025); defaults are its ImageNet recipe."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import BackboneConfigMixin, ViTMAEConfig

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
class MIMAEConfig(BackboneConfigMixin, MIMConfigMixin, ViTMAEConfig):
    """What a model of this project on a ViT is made of. Every field of `ViTMAEConfig` is one here too.

    How images are masked and what the information terms are: see `MIMConfigMixin`, whose units are patches here. With
    `num_masks=1, mi_max_weight=0, mi_min_weight=0` the model is MAE and nothing else. `norm_pix_loss` is True, other
    than in ViTMAE: the official command sets it, and ε_l = 0.5 only makes sense with it.

    Args:
        image_size: side in pixels, or (height, width); multiples of `patch_size`.
        patch_size: side in pixels of a patch.
        hidden_size: width of the encoder's tokens.
        num_hidden_layers: blocks of the encoder.
        num_attention_heads: heads in each block of the encoder.
        intermediate_size: width of the encoder's MLPs.
        decoder_hidden_size: width of the decoder's tokens.
        decoder_num_hidden_layers: blocks of the decoder.
        decoder_num_attention_heads: heads in each block of the decoder.
        decoder_intermediate_size: width of the decoder's MLPs.
        hidden_act: activation function of the MLPs, as transformers calls it.
        latent_pooling: how the tokens of a view become its one vector ẑ: "mean" of the visible patches, "cls" token,
            or mean of "all".
        drop_path_rate: of the last block; a block's residual branches are dropped at a rate that grows linearly from
            0 in the first one. For fine-tuning; pre-training goes without.
        classifier_pooling: what the classifier sees: the "mean" of the patch tokens, through a LayerNorm of its own
            in place of the encoder's last, or the class token ("cls") after the encoder's last.
        use_relative_position_bias: in a `MIMAEBackbone`, to each pair of tokens every head adds a number of its own
            for their offset, as in BEiT.
        use_relative_position_embeddings: in a `MIMAEBackbone`, to each pair of tokens every head adds the query's
            product with learned embeddings of their vertical and of their horizontal offset, as in ViTDet.
        window_size: in a `MIMAEBackbone`, side in patches of the windows that attention is confined to; None = it is
            global. With windows the class token is left out.
        global_attention_indexes: in a `MIMAEBackbone` with windows, blocks, counted from 0, that attend globally all
            the same; None = the last block of each quarter, as in ViTDet.
        add_fpn: a `MIMAEBackbone` brings four feature maps to 4, 2, 1 and 1/2 times the patch grid, as MAE and BEiT
            do for UperNet.
        out_indices, out_features: whose output the feature maps are, as in all of transformers' backbones: 0 or
            "stem" are the embeddings, i or "stage{i}" the i-th block. Default: the last block; with `add_fpn` those
            after 1/3, 1/2, 2/3 and all of the blocks, which are MAE's.

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

    if TYPE_CHECKING:  # `validate_image_size` sees to it
        patch_size: int = 16
    layer_norm_eps: float = 1e-6
    latent_pooling: Literal["mean", "cls", "all"] = "mean"
    drop_path_rate: float | int = 0.0
    classifier_pooling: Literal["mean", "cls"] = "mean"
    use_relative_position_bias: bool = False
    use_relative_position_embeddings: bool = False
    window_size: int | None = None
    global_attention_indexes: list[int] | tuple[int, ...] | None = None
    add_fpn: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(
        self, out_features: list[str] | None = None, out_indices: list[int] | None = None, **kwargs: Any
    ) -> None:
        if out_features is not None or out_indices is not None:
            self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        super().__post_init__(**kwargs)

    @property
    def out_indices(self) -> list[int]:
        """The stages that are named, or else those that suit the depth and the pyramid that there are now.

        A checkpoint's configuration may be given another depth, or a pyramid, after it was read.
        """
        if self._out_indices is not None:
            return self._out_indices
        depth = self.num_hidden_layers
        return [round(depth / 3), depth // 2, round(2 * depth / 3), depth] if self.add_fpn else [depth]

    @out_indices.setter
    def out_indices(self, out_indices: list[int] | tuple[int, ...] | None) -> None:
        self.set_output_features_output_indices(None, None if out_indices is None else list(out_indices))

    @property
    def out_features(self) -> list[str]:
        """The names of `out_indices`."""
        return [self.stage_names[index] for index in self.out_indices]

    @out_features.setter
    def out_features(self, out_features: list[str] | None) -> None:
        self.set_output_features_output_indices(out_features, None)

    @property
    def stage_names(self) -> list[str]:
        """Names of what a backbone can give: the embeddings, and the output of each block."""
        return ["stem", *(f"stage{block}" for block in range(1, self.num_hidden_layers + 1))]

    def window_of_block(self, block: int) -> int | None:
        """Side in patches of the windows of a block, counted from 0; None where its attention is global."""
        depth, chosen = self.num_hidden_layers, self.global_attention_indexes
        is_global = block in ({(i + 1) * depth // 4 - 1 for i in range(4)} if chosen is None else chosen)
        return None if is_global else self.window_size

    def validate_sizes(self) -> None:
        """Part of `@strict`'s validation: widths, heads and positions fit each other."""
        for prefix in ("", "decoder_"):
            width, heads = getattr(self, f"{prefix}hidden_size"), getattr(self, f"{prefix}num_attention_heads")
            if width % heads:
                raise ValueError(
                    f"{prefix}hidden_size={width} is not divisible by {prefix}num_attention_heads={heads}"
                )
            if width % 4:
                raise ValueError(f"{prefix}hidden_size={width} must be a multiple of 4 for 2D sin-cos positions")
        if self.decoder_num_hidden_layers < 1:
            raise ValueError(f"decoder_num_hidden_layers={self.decoder_num_hidden_layers} must be at least 1")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={self.drop_path_rate} must lie in 0..1, below 1")

    def validate_backbone(self) -> None:
        """Part of `@strict`'s validation: windows, relative positions and feature maps make sense together."""
        if self.use_relative_position_bias and self.use_relative_position_embeddings:
            raise ValueError(
                "use_relative_position_bias and use_relative_position_embeddings are two forms of the same: set one"
            )
        if self.window_size is not None and self.window_size < 1:
            raise ValueError(f"window_size={self.window_size} must be at least 1, or None for global attention")
        if self.global_attention_indexes is not None:
            if self.window_size is None:
                raise ValueError("global_attention_indexes without window_size: attention is global in every block")
            if outside := [i for i in self.global_attention_indexes if not 0 <= i < self.num_hidden_layers]:
                raise ValueError(
                    f"global_attention_indexes={outside}: blocks are counted from 0 to {self.num_hidden_layers - 1}"
                )
        if self.add_fpn and len(set(self.out_indices)) != 4:
            raise ValueError(
                f"add_fpn=True makes a pyramid of four maps, but out_indices={self.out_indices} of "
                f"{self.num_hidden_layers} blocks: name four"
            )
