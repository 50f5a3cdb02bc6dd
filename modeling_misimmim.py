"""MI-SimMIM on top of transformers' Swin: the whole grid of each view is encoded, with mask tokens in it.

The objective, and Algorithm 1, are in `modeling_mim`; here are the Swin and SimMIM's decoder. Symbols of the paper and
of this file:

    code                 paper    shape
    pixel_values         X        (B, C, H, W)
    mask                 m_j      (B, N, L)         0 is keep, 1 is remove
    visible_embeddings   X_j      (B, N, V·s², D₁)  normalised embeddings of the patches that a view sees
    feature_map                   (B·N, D, h, w)    of the last stage, after the last LayerNorm
    latent_vector        ẑ_j      (B, N, D)         mean of its visible tokens
    logits               φ(X̂)     (B, N, L, P)

B images, N masks, L units of a mask, V visible units, s² patches in a unit, T patches of the image, D₁ width of the
first stage, D of the last, P = mask_patch_size² · C values of a unit, K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import SwinForImageClassification, SwinForMaskedImageModeling, SwinModel
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.swin.modeling_swin import (
    SwinDropPath,
    SwinEmbeddings,
    SwinEncoder,
    SwinLayer,
    SwinMLP,
    SwinPreTrainedModel,
    SwinRelativePositionBias,
)
from transformers.utils.generic import can_return_tuple

from .configuration_misimmim import MISimMIMConfig
from .modeling_mim import (
    PRETRAINING_PARTS,
    EncoderOutput,
    MaskedOutput,
    MIMEncoderMixin,
    MIMForImageClassificationMixin,
    MIMForPreTrainingMixin,
    MIMPreTrainedMixin,
    check_image_size,
    gather_patches,
    init_linear,
    patchify,
)

# Published Swin checkpoints carry the key names of transformers 4
register_checkpoint_conversion_mapping(
    "misimmim",
    get_checkpoint_conversion_mapping("swin"),
    overwrite=True,  # Hub remote code may be imported beside the package
)


def visible_tokens(feature_map: torch.Tensor, ids_visible: torch.Tensor, side: int) -> torch.Tensor:
    """The tokens of the visible units.

    Args:
        feature_map: (B, N, D, H, W), or (B, 1, D, H, W) where all views have the same.
        ids_visible: (B, N, V).
        side: s, tokens per side of a unit.

    Returns:
        (B, N, V·s², D).
    """
    num_features = feature_map.shape[2]
    units = patchify(feature_map.flatten(0, 1), side).unflatten(0, feature_map.shape[:2])  # (B, N or 1, L, s²·D)
    visible = gather_patches(units.expand(-1, ids_visible.shape[1], -1, -1), ids_visible)  # (B, N, V, s²·D)
    return visible.unflatten(-1, (-1, num_features)).flatten(2, 3)


def as_map(tokens: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Tokens (B, h·w, D), row by row → (B, D, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, grid_size)


class MISimMIMEmbeddings(SwinEmbeddings):
    """Patch embeddings, once per image; masking is the model's business. Swin's positions are in its attention."""

    config: MISimMIMConfig

    def embed_patches(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """(B, C, H, W) → normalised patch embeddings (B, D₁, H/p, W/p).

        Raises:
            ValueError: another number of channels or another image size than the configuration declares; with
                `interpolate_pos_encoding` any size is taken that `encoder_stride` divides and in whose last map a
                window finds room.
        """
        config = self.config
        channels, height, width = pixel_values.shape[-3:]
        if channels != config.num_channels:
            raise ValueError(f"images of {channels} channels, but the model was configured for {config.num_channels}")
        check_image_size(config, (height, width), interpolate_pos_encoding, divisor="encoder_stride")
        smallest = config.window_size * config.encoder_stride
        if min(height, width) < smallest:
            raise ValueError(
                f"image of {height} x {width} pixels is smaller than a window of the last stage, {smallest} pixels: "
                f"enlarge it, or make a model with a smaller window_size than {config.window_size}"
            )
        patches, grid_size = self.patch_embeddings(pixel_values)  # (B, T, D₁)
        return as_map(self.norm(patches), grid_size)


class DroppableMLP(SwinMLP):
    """An MLP of Swin with stochastic depth, which transformers' Swin has on the attention branch alone."""

    def __init__(self, mlp: SwinMLP, drop_path_rate: float):
        nn.Module.__init__(self)
        self.fc1, self.activation_fn, self.fc2 = mlp.fc1, mlp.activation_fn, mlp.fc2
        self.drop_path = SwinDropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.drop_path(super().forward(hidden_states))


class MISimMIMPreTrainedModel(MIMPreTrainedMixin, SwinPreTrainedModel):
    """Initialisation, for all classes of this file.

    The rules are the official SimMIM's: linear layers, mask token and relative positions N(0, 0.02), zero biases,
    convolutions as torch has them. Stock Swin starts mask token and relative positions at zero and draws convolutions
    from N(0, 0.02). V starts as in MI-MAE.
    """

    config: MISimMIMConfig
    config_class = MISimMIMConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            is_of_approximator = hasattr(module, "initial_bias")
            init_linear(module, std=None if is_of_approximator else std)
        elif isinstance(module, nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)
        elif isinstance(module, SwinEmbeddings) and module.mask_token is not None:
            init.trunc_normal_(module.mask_token, std=std)
        elif isinstance(module, SwinRelativePositionBias):
            init.trunc_normal_(module.relative_position_bias_table, std=std)
            init.copy_(module.relative_position_index, module._create_relative_position_index().view(-1))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters with more than one dimension that do not decay, in timm's convention."""
        undecayed = ("mask_token", "relative_position_bias_table")
        return {name for name, _ in self.named_parameters() if name.endswith(undecayed)}


class MISimMIMEncoder(MISimMIMPreTrainedModel, SwinEncoder):
    """Swin's stages, with two things of the official Swin that transformers' lacks.

    Paths are dropped in the MLP branch, too. And there is no shift where the map of a stage is a single window wide,
    which is decided here and not by the first image that is seen.
    """

    def __init__(self, config: MISimMIMConfig, grid_size: tuple[int, int]):
        SwinEncoder.__init__(self, config, grid_size)
        for block in [module for module in self.modules() if isinstance(module, SwinLayer)]:
            if isinstance(block.drop_path, SwinDropPath):
                block.mlp = DroppableMLP(block.mlp, block.drop_path.drop_prob)
            if min(block.input_resolution) <= config.window_size:
                block.shift_size = 0


class MISimMIMModel(MIMEncoderMixin, MISimMIMPreTrainedModel, SwinModel):
    """The encoder. `forward` and `encode` see the whole image; `forward_masked`, with a mask token, sees views."""

    embeddings: MISimMIMEmbeddings
    _keys_to_ignore_on_load_unexpected: Any = (
        *(*SwinPreTrainedModel._keys_to_ignore_on_load_unexpected, *PRETRAINING_PARTS),
        *(r"^classifier\.", r"embeddings\.mask_token$"),
    )

    def __init__(self, config: MISimMIMConfig, use_mask_token: bool = False):
        SwinPreTrainedModel.__init__(self, config)
        self.embeddings = MISimMIMEmbeddings(config, use_mask_token=use_mask_token)
        self.encoder = MISimMIMEncoder(config, self.embeddings.patch_grid)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()
        self.freeze_fixed_parameters()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> EncoderOutput:
        """Features of the whole image (B, C, H, W), normalised.

        Raises:
            ValueError: see `MISimMIMEmbeddings.embed_patches`.
        """
        patches = self.embeddings.embed_patches(pixel_values, interpolate_pos_encoding)  # (B, D₁, H/p, W/p)
        output, feature_map = self._encode_map(patches, **kwargs)
        return EncoderOutput(
            last_hidden_state=feature_map.flatten(2).transpose(1, 2),
            pooler_output=feature_map.mean(dim=(2, 3)),
            feature_map=feature_map,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def encode_views(
        self, patches: torch.Tensor, ids_visible: torch.Tensor, mask: torch.Tensor, **kwargs: Any
    ) -> MaskedOutput:
        """Encodes patches (B, D₁, H/p, W/p), with mask tokens in place of the masked ones; see `draw_masks`."""
        if self.embeddings.mask_token is None:
            raise ValueError(
                "this encoder has no mask token: build it with use_mask_token=True to show it masked views"
            )
        config, patches = self.config, patches.unsqueeze(1)  # (B, 1, D₁, H/p, W/p)
        side = config.mask_patch_size // config.patch_size
        rows, columns = (length // side for length in patches.shape[-2:])
        is_masked = mask.bool().unflatten(-1, (rows, columns))  # (B, N, rows, columns) of units
        is_masked = is_masked.repeat_interleave(side, dim=-2).repeat_interleave(side, dim=-1)  # of patches
        mask_token = self.embeddings.mask_token.to(patches.dtype).view(-1, 1, 1)  # (D₁, 1, 1)
        views = torch.where(is_masked.unsqueeze(2), mask_token, patches)  # (B, N, D₁, H/p, W/p)

        output, feature_map = self._encode_map(views.flatten(0, 1), **kwargs)  # (B·N, D, h, w)
        latent = visible_tokens(
            feature_map.unflatten(0, mask.shape[:2]), ids_visible, config.mask_patch_size // config.encoder_stride
        )
        return MaskedOutput(
            last_hidden_state=feature_map.flatten(2).transpose(1, 2),
            latent_vector=latent.mean(dim=2),
            visible_embeddings=visible_tokens(patches, ids_visible, side),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _encode_map(self, patches: torch.Tensor, **kwargs: Any) -> tuple[EncoderOutput, torch.Tensor]:
        """(B, D₁, H/p, W/p) → the encoder's output, and the last map (B, D, h, w) after the last norm."""
        grid_size = patches.shape[-2:]
        hidden_states = self.embeddings.dropout(patches.flatten(2).transpose(1, 2))
        # always_partition: or transformers' Swin would fit its windows to the first small map it sees, for good
        output = self.encoder(hidden_states, grid_size, always_partition=True, **{**kwargs, "return_dict": True})
        downsampling = 2 ** (len(self.config.depths) - 1)
        map_size = (grid_size[0] // downsampling, grid_size[1] // downsampling)
        return output, as_map(self.layernorm(output.last_hidden_state), map_size)

    def modules_by_depth(self) -> list[nn.Module]:
        """For layer decay: the embeddings, then the blocks of all stages; only the last norm is in none of them.

        As in the official SimMIM, a stage's downsampling counts to its last block.
        """
        depths: list[nn.Module] = [self.embeddings]
        stages: Any = self.encoder.layers
        for stage in stages:
            *blocks, last = stage.blocks
            depths += [*blocks, last if stage.downsample is None else nn.ModuleList([last, stage.downsample])]
        return depths


class MISimMIMForPreTraining(MIMForPreTrainingMixin, MISimMIMPreTrainedModel, SwinForMaskedImageModeling):
    """MI-SimMIM's pre-training objective over the Swin; its `forward` is Algorithm 1."""

    def __init__(self, config: MISimMIMConfig):
        SwinPreTrainedModel.__init__(self, config)
        self.swin = MISimMIMModel(config, use_mask_token=True)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, config.encoder_stride**2 * config.num_channels, kernel_size=1),
            nn.PixelShuffle(config.encoder_stride),
        )
        self.build_information_parts(in_features=config.embed_dim)
        self.post_init()
        self.freeze_fixed_parameters()

    def decode(self, views: MaskedOutput, image_size: Sequence[int]) -> torch.Tensor:
        """Pixels of every unit, (B, N, L, P), from the encoded views of images of this (height, width)."""
        stride = self.config.encoder_stride
        feature_map = as_map(views.last_hidden_state, (image_size[0] // stride, image_size[1] // stride))
        pixels = self.decoder(feature_map)  # (B·N, C, H, W)
        return self.patchify(pixels).unflatten(0, views.mask.shape[:2])

    def pixel_error(self, difference: torch.Tensor) -> torch.Tensor:
        """In SimMIM the absolute error takes the place of Eq. 1's squared one."""
        return difference.abs()


class MISimMIMForImageClassification(
    MIMForImageClassificationMixin, MISimMIMPreTrainedModel, SwinForImageClassification
):
    """The encoder with a linear classifier on the mean of the last map, for fine-tuning as SimMIM does it."""

    _keys_to_ignore_on_load_unexpected: Any = MISimMIMModel._keys_to_ignore_on_load_unexpected

    def __init__(self, config: MISimMIMConfig):
        SwinPreTrainedModel.__init__(self, config)
        self.swin = MISimMIMModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()
        self.freeze_fixed_parameters()


MISimMIMConfig.register_for_auto_class()
MISimMIMModel.register_for_auto_class("AutoModel")
MISimMIMForPreTraining.register_for_auto_class("AutoModelForPreTraining")
MISimMIMForImageClassification.register_for_auto_class("AutoModelForImageClassification")
