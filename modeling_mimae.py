"""MI-MAE on top of transformers' ViTMAE: one image, N masked views of it, one encoder, one decoder.

The objective, and Algorithm 1, are in `modeling_mim`; here are the ViT and its decoder. Symbols of the paper and
of this file:

    code                 paper    shape
    pixel_values         X        (B, C, H, W)
    mask                 m_j      (B, N, L)         0 is keep, 1 is remove
    visible_embeddings   X_j      (B, N, V, D)      patch embeddings plus positions, gathered per view
    latent               ẑ_j      (B·N, 1+V, D)     after the encoder's last LayerNorm
    latent_vector        ẑ_j      (B, N, D)         the same as one vector
    logits               φ(X̂)     (B, N, L, P)

B images, N masks, L patches, V visible patches per mask, D width, P = patch_size² · C values of a patch, K classes.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import ViTMAEForPreTraining, ViTMAEModel
from transformers import initialization as init
from transformers.conversion_mapping import WeightRenaming, register_checkpoint_conversion_mapping
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.dinov2.modeling_dinov2 import Dinov2DropPath
from transformers.models.vit_mae.modeling_vit_mae import (
    ViTMAEAttention,
    ViTMAEDecoder,
    ViTMAEEmbeddings,
    ViTMAELayer,
    ViTMAEPreTrainedModel,
    build_2d_sinusoidal_position_embedding,
    eager_attention_forward,
)
from transformers.utils.output_capturing import capture_outputs

from .configuration_mimae import MIMAEConfig
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
)

# Published ViTMAE checkpoints carry the key names of transformers 4. The first rule mends what transformers 5 writes
# when it saves a model loaded from one of them.
register_checkpoint_conversion_mapping(
    "mimae",
    [
        WeightRenaming(r"decoder_encoder\.layer\.", "decoder_layers."),
        WeightRenaming(r"encoder\.layer\.", "layers."),
        WeightRenaming(r"attention\.attention\.query", "attention.q_proj"),
        WeightRenaming(r"attention\.attention\.key", "attention.k_proj"),
        WeightRenaming(r"attention\.attention\.value", "attention.v_proj"),
        WeightRenaming(r"attention\.output\.dense", "attention.o_proj"),
        WeightRenaming(r"intermediate\.dense", "mlp.fc1"),
        WeightRenaming(r"output\.dense", "mlp.fc2"),
    ],
    overwrite=True,  # Hub remote code may be imported beside the package
)


def sincos_positions(grid_size: tuple[int, int], width: int) -> torch.Tensor:
    """Fixed 2D sin-cos positions (1, 1+L, width), zero for the class token.

    The official MAE encodes the column in the first half and the row in the second; published weights rely on it.
    """
    positions = build_2d_sinusoidal_position_embedding(*grid_size, embed_dim=width, cls_token=True)
    rows, columns = positions.chunk(2, dim=-1)
    return torch.cat([columns, rows], dim=-1).unsqueeze(0)


def interpolate_positions(
    positions: torch.Tensor, grid_size: tuple[int, int], new_grid_size: tuple[int, int]
) -> torch.Tensor:
    """Positions (1, 1+L, D) of one grid, bicubically resized to another; the class token's stays."""
    if grid_size == new_grid_size:
        return positions
    class_position, patch_positions = positions[:, :1], positions[:, 1:]
    patch_positions = patch_positions.unflatten(1, grid_size).permute(0, 3, 1, 2)  # (1, D, h, w)
    resized = nn.functional.interpolate(patch_positions.float(), size=new_grid_size, mode="bicubic")
    return torch.cat([class_position, resized.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


def pool_tokens(tokens: torch.Tensor, pooling: str) -> torch.Tensor:
    """Tokens with the class token first, (…, 1+K, D) → (…, D): mean of the patches, class token, or mean of all."""
    if pooling == "cls":
        return tokens[..., 0, :]
    return (tokens if pooling == "all" else tokens[..., 1:, :]).mean(dim=-2)


class MIMAEEmbeddings(ViTMAEEmbeddings):
    """Patch embeddings plus fixed positions, once per image; masking is the model's business."""

    config: MIMAEConfig

    def embed_patches(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """(B, C, H, W) → patch embeddings plus positions (B, L, D).

        Raises:
            ValueError: another number of channels or another image size than the configuration declares; with
                `interpolate_pos_encoding` any size is taken that the patches divide.
        """
        height, width = pixel_values.shape[-2:]
        check_image_size(self.config, (height, width), interpolate_pos_encoding, divisor="patch_size")
        patches = self.patch_embeddings(pixel_values)  # (B, L, D)
        return patches + self.positions_for((height, width))[:, 1:]

    def prepend_class_token(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, L, D) → (B, 1+L, D). The class token's own position is 0 from scratch, but not in every checkpoint."""
        class_token = self.cls_token + self.position_embeddings[:, :1]
        return torch.cat([class_token.expand(patches.shape[0], -1, -1), patches], dim=1)

    def positions_for(self, image_size: tuple[int, int]) -> torch.Tensor:
        """Positions (1, 1+L, D) for an image of this (height, width)."""
        patch_size = self.config.patch_size
        grid_size = (image_size[0] // patch_size, image_size[1] // patch_size)
        return interpolate_positions(self.position_embeddings, self.config.grid_size, grid_size)


class MIMAELastDecoderLayer(ViTMAELayer):
    """ViTMAE's block without the output of the first tokens, which are keys and values for the others."""

    def forward(  # type: ignore[override]  # only the decoder below calls it
        self, hidden_states: torch.Tensor, first_query: int
    ) -> torch.Tensor:
        """(B·N, T, D) → (B·N, T - first_query, D)."""
        normalised = self.layernorm_before(hidden_states)
        hidden_states = hidden_states[:, first_query:] + self.dropout(self.attend(normalised, first_query))
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states)))

    def attend(self, tokens: torch.Tensor, first_query: int) -> torch.Tensor:
        """Attention of the tokens from `first_query` on to all."""
        module = self.attention
        query, key, value = (
            projection(asked).unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)  # (B·N, A, T, d)
            for projection, asked in (
                (module.q_proj, tokens[:, first_query:]),
                (module.k_proj, tokens),
                (module.v_proj, tokens),
            )
        )
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)
        dropout = module.attention_dropout if self.training else 0.0
        output, _ = attention(module, query, key, value, None, dropout=dropout, scaling=module.scaling)
        return module.o_proj(output.flatten(2))


class MIMAEDecoder(ViTMAEDecoder):
    """ViTMAE's decoder, for any grid, with all views of an image side by side, and for the masked patches alone.

    Attention does not mind the order of tokens, so they stay in that of the mask: class token, visible, masked.
    """

    def __init__(self, config: MIMAEConfig, num_patches: int):
        nn.Module.__init__(self)
        width = config.decoder_hidden_size
        self.config = deepcopy(config)
        self.config.hidden_size, self.config.intermediate_size = width, config.decoder_intermediate_size
        self.config.num_hidden_layers = config.decoder_num_hidden_layers
        self.config.num_attention_heads = config.decoder_num_attention_heads

        self.decoder_embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, width), requires_grad=False)
        layers = [ViTMAELayer(self.config) for _ in range(config.decoder_num_hidden_layers - 1)]
        self.decoder_layers = nn.ModuleList([*layers, MIMAELastDecoderLayer(self.config)])
        self.decoder_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(width, config.patch_size**2 * config.num_channels)

    def forward(  # type: ignore[override]  # only the model below calls it
        self,
        latent: torch.Tensor,
        ids_shuffle: torch.Tensor,
        *,
        first_predicted: int,
        grid_size: tuple[int, int],
        source_grid: tuple[int, int],
    ) -> torch.Tensor:
        """Mask tokens beside the visible ones, each with the position of its patch; pixels from all of them.

        Args:
            latent: (B·N, 1+V, D).
            ids_shuffle: (B, N, L), the visible patches of each view first.
            first_predicted: the place in that order from which on patches are predicted: 0 for all.
            grid_size: of this image, in patches; source_grid: the one that the positions were made for.

        Returns:
            Pixels (B, N, L - first_predicted, P), in that order.
        """
        tokens = self.decoder_embed(latent)  # (B·N, 1+V, D_dec)
        ids = ids_shuffle.flatten(0, 1)  # (B·N, L)
        masked = self.mask_token.to(tokens.dtype).expand(len(ids), ids.shape[1] + 1 - tokens.shape[1], -1)
        positions = interpolate_positions(self.decoder_pos_embed, source_grid, grid_size)[0]  # (1+L, D_dec)
        places = nn.functional.pad(ids + 1, (1, 0))  # (B·N, 1+L), the class token's own first
        hidden_states = torch.cat([tokens, masked], dim=1) + positions[places]  # (B·N, 1+L, D_dec)

        *layers, last = self.decoder_layers
        for layer in layers:
            hidden_states = layer(hidden_states)
        predicted = last(hidden_states, first_query=1 + first_predicted)  # (B·N, L - first_predicted, D_dec)
        pixels = self.decoder_pred(self.decoder_norm(predicted))
        return pixels.unflatten(0, ids_shuffle.shape[:2])


class MIMAEPreTrainedModel(MIMPreTrainedMixin, ViTMAEPreTrainedModel):
    """Initialisation, for all classes of this file.

    Stock ViTMAE from scratch has all-zero position embeddings, because its generic initialisation runs over the
    sin-cos one. The rules here are the official MAE's: xavier-uniform linears and patch projection, zero biases,
    class and mask token N(0, 0.02), sin-cos positions that stay fixed.
    """

    config: MIMAEConfig
    config_class = MIMAEConfig

    def post_init(self) -> None:
        # The official MAE draws q, k and v as one linear layer of 3D outputs
        for module in self.modules():
            if isinstance(module, ViTMAEAttention):
                for projection in (module.q_proj, module.k_proj, module.v_proj):
                    projection.initial_fan_out = 3 * projection.out_features  # type: ignore[assignment]  # see `init_linear`
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init_linear(module, std=getattr(module, "initial_std", None))
        elif isinstance(module, nn.Conv2d):
            # the patch projection, (D, C, p, p): xavier-uniform as the linear layer over P values that it is
            bound = (6 / (module.weight.shape[0] + module.weight[0].numel())) ** 0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ViTMAEEmbeddings):
            init.normal_(module.cls_token, std=self.config.initializer_range)
            init.copy_(module.position_embeddings, self._positions(self.config.hidden_size))
        elif isinstance(module, ViTMAEDecoder):
            init.normal_(module.mask_token, std=self.config.initializer_range)
            init.copy_(module.decoder_pos_embed, self._positions(self.config.decoder_hidden_size))

    def _positions(self, width: int) -> torch.Tensor:
        return sincos_positions(self.config.grid_size, width)

    def freeze_fixed_parameters(self) -> None:
        """Nor are positions learned."""
        super().freeze_fixed_parameters()
        for module in self.modules():
            if isinstance(module, ViTMAEEmbeddings):
                module.position_embeddings.requires_grad_(False)
            elif isinstance(module, ViTMAEDecoder):
                module.decoder_pos_embed.requires_grad_(False)


def build_blocks(config: MIMAEConfig, make: Callable[[int], ViTMAELayer]) -> nn.ModuleList:
    """The encoder's blocks, each made from its index, with drop path at a rate that grows from 0 in the first."""
    blocks = [make(depth) for depth in range(config.num_hidden_layers)]
    for depth, block in enumerate(blocks):
        rate = config.drop_path_rate * depth / max(1, config.num_hidden_layers - 1)
        if rate > 0:  # both residual branches of a block end in its dropout
            block.add_module("dropout", nn.Sequential(block.dropout, Dinov2DropPath(rate)))
    return nn.ModuleList(blocks)


class MIMAEModel(MIMEncoderMixin, MIMAEPreTrainedModel, ViTMAEModel):
    """The encoder. `forward` and `encode` see the whole image and are deterministic; `forward_masked` sees views."""

    embeddings: MIMAEEmbeddings
    # the rest of any checkpoint, the stock ViT's, too
    _keys_to_ignore_on_load_unexpected: Any = (*PRETRAINING_PARTS, r"^pooler\.", r"^fc_norm\.", r"^classifier\.")

    def __init__(self, config: MIMAEConfig):
        ViTMAEPreTrainedModel.__init__(self, config)
        self.embeddings = MIMAEEmbeddings(config)
        self.layers = build_blocks(config, lambda depth: ViTMAELayer(config))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()
        self.freeze_fixed_parameters()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> EncoderOutput:
        """Features of the whole image (B, C, H, W), normalised. Unlike ViTMAE's, never masked.

        Raises:
            ValueError: see `MIMAEEmbeddings.embed_patches`.
        """
        patches = self.embeddings.embed_patches(pixel_values, interpolate_pos_encoding)  # (B, L, D)
        latent = self._encode_sequence(self.embeddings.prepend_class_token(patches), **kwargs)  # (B, 1+L, D)
        grid_size = [side // self.config.patch_size for side in pixel_values.shape[-2:]]
        return EncoderOutput(
            last_hidden_state=latent,
            pooler_output=pool_tokens(latent, self.config.latent_pooling),
            feature_map=latent[:, 1:].transpose(1, 2).unflatten(2, grid_size),
        )

    @capture_outputs(tie_last_hidden_states=False)
    def encode_views(
        self, patches: torch.Tensor, ids_visible: torch.Tensor, mask: torch.Tensor, **kwargs: Any
    ) -> MaskedOutput:
        """Encodes the visible ones of the patches (B, L, D), and nothing else; see `draw_masks`."""
        num_views = self.config.num_views
        views = patches.unsqueeze(1).expand(-1, num_views, -1, -1)  # (B, N, L, D), not copied
        visible_embeddings = gather_patches(views, ids_visible)  # (B, N, V, D)
        sequence = self.embeddings.prepend_class_token(visible_embeddings.flatten(0, 1))  # (B·N, 1+V, D)
        latent = self._encode_sequence(sequence, **kwargs)  # (B·N, 1+V, D)
        return MaskedOutput(
            last_hidden_state=latent,
            latent_vector=pool_tokens(latent, self.config.latent_pooling).unflatten(0, (-1, num_views)),
            visible_embeddings=visible_embeddings,
        )

    def modules_by_depth(self) -> list[nn.Module]:
        """For layer decay: the embeddings, then the blocks; only the last norm is in none of them."""
        return [self.embeddings, *self.layers]

    def _encode_sequence(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return self.layernorm(hidden_states)


# ViTMAE's patchify has to be told that images of other sizes are welcome
class MIMAEForPreTraining(MIMForPreTrainingMixin, MIMAEPreTrainedModel, ViTMAEForPreTraining):  # type: ignore[misc]
    """MI-MAE's pre-training objective over the ViT; its `forward` is Algorithm 1."""

    def __init__(self, config: MIMAEConfig):
        ViTMAEPreTrainedModel.__init__(self, config)
        self.vit = MIMAEModel(config)
        self.decoder = MIMAEDecoder(config, num_patches=config.num_patches)
        self.build_information_parts(in_features=config.hidden_size)
        self.post_init()
        self.freeze_fixed_parameters()

    def decode(self, views: MaskedOutput, image_size: Sequence[int]) -> torch.Tensor:
        """Pixels of every patch, (B, N, L, P), from the encoded views of images of this (height, width)."""
        return gather_patches(self._decode_from(views, image_size, 0), views.ids_restore)

    def decode_masked(self, views: MaskedOutput, image_size: Sequence[int]) -> torch.Tensor:
        """Pixels of the masked patches alone, (B, N, L-V, P), in the order of `ids_masked`."""
        return self._decode_from(views, image_size, views.ids_visible.shape[-1])

    def _decode_from(self, views: MaskedOutput, image_size: Sequence[int], first_predicted: int) -> torch.Tensor:
        patch_size = self.config.patch_size
        return self.decoder(
            views.last_hidden_state,
            torch.cat([views.ids_visible, views.ids_masked], dim=-1),
            first_predicted=first_predicted,
            grid_size=(image_size[0] // patch_size, image_size[1] // patch_size),
            source_grid=self.config.grid_size,
        )

    def pixel_error(self, difference: torch.Tensor) -> torch.Tensor:
        """Eq. 1: the squared error."""
        return difference.square()


class MIMAEForImageClassification(MIMForImageClassificationMixin, MIMAEPreTrainedModel):
    """The encoder with a linear classifier, for fine-tuning as the official MAE does it.

    With `classifier_pooling="mean"` the patch tokens are averaged before they are normalised: `fc_norm` takes the
    place of the encoder's last LayerNorm, which is gone.
    """

    # the stock ViT's pooler; the last norm where the patches are averaged first
    _keys_to_ignore_on_load_unexpected: Any = (*PRETRAINING_PARTS, r"^(vit\.)?pooler\.", r"^(vit\.)?layernorm\.")

    def __init__(self, config: MIMAEConfig):
        super().__init__(config)
        self.vit = MIMAEModel(config)
        if config.classifier_pooling == "mean":
            self.vit.add_module("layernorm", nn.Identity())
            self.fc_norm: nn.Module = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        else:
            self.fc_norm = nn.Identity()
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.classifier.initial_std = 2e-5  # type: ignore[assignment]  # see `init_linear`
        self.post_init()
        self.freeze_fixed_parameters()

    def freeze_fixed_parameters(self) -> None:
        """Nothing is fixed: fine-tuning moves the positions, too, as in the official MAE."""
        self.vit.embeddings.position_embeddings.requires_grad_(True)

    def no_weight_decay(self) -> set[str]:
        """As in the official MAE's fine-tuning, class token and positions."""
        return {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}

    def pool(self, output: EncoderOutput) -> torch.Tensor:
        """What the classifier sees of an image, (B, D)."""
        return self.fc_norm(pool_tokens(output.last_hidden_state, self.config.classifier_pooling))


MIMAEConfig.register_for_auto_class()
MIMAEModel.register_for_auto_class("AutoModel")
MIMAEForPreTraining.register_for_auto_class("AutoModelForPreTraining")
MIMAEForImageClassification.register_for_auto_class("AutoModelForImageClassification")
