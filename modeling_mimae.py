"""MI-MAE on top of transformers' ViTMAE: one image, N masked views of it, one encoder, one decoder.

Symbols of the paper and of this file:

    code                 paper    shape
    pixel_values         X        (B, C, H, W)
    mask                 m_j      (B, N, L)         0 is keep, 1 is remove
    visible_embeddings   X_j      (B, N, V, D)      patch embeddings plus positions, gathered per view
    latent               ẑ_j      (B·N, 1+V, D)     after the encoder's last LayerNorm
    latent_vector        ẑ_j      (B, N, D)         the same as one vector
    logits               φ(X̂)     (B, N, L, P)

B images, N masks, L patches, V visible patches per mask, D width, P = patch_size² · C values of a patch, K classes.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import ViTMAEForPreTraining, ViTMAEModel
from transformers import initialization as init
from transformers.conversion_mapping import WeightRenaming, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import ImageClassifierOutput, ModelOutput
from transformers.models.dinov2.modeling_dinov2 import Dinov2DropPath
from transformers.models.vit_mae.modeling_vit_mae import (
    ViTMAEAttention,
    ViTMAEDecoder,
    ViTMAEEmbeddings,
    ViTMAELayer,
    ViTMAEPreTrainedModel,
    build_2d_sinusoidal_position_embedding,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_mimae import MIMAEConfig
from .masking import masks_from_ids, multi_mask_ids, num_visible_patches
from .mutual_information import GaussianApproximator, InformationGate, InformationTerms, information_terms

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


@dataclass
class MIMAEModelOutput(ModelOutput):
    """Unmasked features: `last_hidden_state` (B, 1+L, D), `pooler_output` (B, D), `feature_map` (B, D, h, w)."""

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    feature_map: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class MIMAEMaskedOutput(ModelOutput):
    """The masked views after the encoder.

    `last_hidden_state` (B·N, 1+V, D), `visible_embeddings` (B, N, V, D), `mask` and `ids_restore` (B, N, L); hidden
    states and attentions are over B·N.
    """

    last_hidden_state: torch.FloatTensor | None = None
    visible_embeddings: torch.FloatTensor | None = None
    mask: torch.FloatTensor | None = None
    ids_restore: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class MIMAEForPreTrainingOutput(ModelOutput):
    """Every loss term by name, unweighted but for the first two.

    loss: objective + approximation_loss, for the one backward.
    objective: Eq. 11, λ1·L_rec + gate·(λ2·L_max + λ3·L_min).
    reconstruction_loss, mi_max_loss, mi_min_loss, approximation_loss: Eq. 1, 8, 10, 9.
    mi_active: the gate, 1 where the information terms counted.
    logits (B, N, L, P), mask and ids_restore (B, N, L), latent_vector (B, N, D).
    latent_norm: mean of ‖ẑ‖. min_variance, dead_variance_fraction: V's smallest variance, and the share of its
        variance units that are 0 on the whole batch (both 0 where there is no V).
    hidden_states, attentions: of the encoder, over B·N.
    """

    loss: torch.FloatTensor | None = None
    objective: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    mi_max_loss: torch.FloatTensor | None = None
    mi_min_loss: torch.FloatTensor | None = None
    approximation_loss: torch.FloatTensor | None = None
    mi_active: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    mask: torch.FloatTensor | None = None
    ids_restore: torch.LongTensor | None = None
    latent_vector: torch.FloatTensor | None = None
    latent_norm: torch.FloatTensor | None = None
    min_variance: torch.FloatTensor | None = None
    dead_variance_fraction: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


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


def gather_patches(sequence: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Tokens (…, L, D) at ids (…, K) → (…, K, D); the index is expanded, never materialised at width D."""
    return sequence.gather(-2, ids.unsqueeze(-1).expand(*ids.shape, sequence.shape[-1]))


def pool_tokens(tokens: torch.Tensor, pooling: str) -> torch.Tensor:
    """Tokens with the class token first, (…, 1+K, D) → (…, D): mean of the patches, class token, or mean of all."""
    if pooling == "cls":
        return tokens[..., 0, :]
    return (tokens if pooling == "all" else tokens[..., 1:, :]).mean(dim=-2)


class MIMAEEmbeddings(ViTMAEEmbeddings):
    """Patch embeddings plus fixed positions, once per image; masking is the model's business."""

    def embed_patches(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """(B, C, H, W) → patch embeddings plus positions (B, L, D).

        Raises:
            ValueError: another number of channels or another image size than the configuration declares; with
                `interpolate_pos_encoding` any size is taken that the patches divide.
        """
        height, width = pixel_values.shape[-2:]
        if not interpolate_pos_encoding and (height, width) != self.config.image_size_2d:
            raise ValueError(
                f"image of {height} x {width} pixels, but the model was configured for "
                f"{self.config.image_size_2d[0]} x {self.config.image_size_2d[1]}; resize it, "
                "or pass interpolate_pos_encoding=True"
            )
        if height % self.patch_size or width % self.patch_size:  # the convolution would drop the rest of the image
            raise ValueError(f"image of {height} x {width} pixels is not divisible by patch_size={self.patch_size}")
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


class MIMAEDecoder(ViTMAEDecoder):
    """ViTMAE's decoder, for any grid and with all views of an image side by side."""

    def initialize_weights(self, num_patches: int):
        """ViTMAE's constructor calls this and fails on a grid that is not square; `_init_weights` does the work."""

    def forward(
        self, latent: torch.Tensor, ids_restore: torch.Tensor, grid_size: tuple[int, int], source_grid: tuple[int, int]
    ) -> torch.Tensor:
        """Visible tokens back in their places, mask tokens elsewhere, pixels from all of them.

        Args:
            latent: (B·N, 1+V, D).
            ids_restore: (B, N, L).
            grid_size: of this image, in patches; source_grid: the one that the positions were made for.

        Returns:
            logits (B, N, L, P).
        """
        tokens = self.decoder_embed(latent)  # (B·N, 1+V, D_dec)
        class_token, visible = tokens[:, :1], tokens[:, 1:]
        ids = ids_restore.flatten(0, 1)  # (B·N, L)
        masked = self.mask_token.to(tokens.dtype).expand(ids.shape[0], ids.shape[1] - visible.shape[1], -1)
        patches = gather_patches(torch.cat([visible, masked], dim=1), ids)  # (B·N, L, D_dec)

        hidden_states = torch.cat([class_token, patches], dim=1)
        hidden_states = hidden_states + interpolate_positions(self.decoder_pos_embed, source_grid, grid_size)
        for layer in self.decoder_layers:
            hidden_states = layer(hidden_states)
        logits = self.decoder_pred(self.decoder_norm(hidden_states))[:, 1:]  # (B·N, L, P)
        return logits.unflatten(0, ids_restore.shape[:2])


class MIMAEPreTrainedModel(ViTMAEPreTrainedModel):
    """Initialisation and saving, for all classes of this file.

    Stock ViTMAE from scratch has all-zero position embeddings, because its generic initialisation runs over the
    sin-cos one. The rules here are the official MAE's: xavier-uniform linears and patch projection, zero biases,
    class and mask token N(0, 0.02), sin-cos positions that stay fixed.
    """

    config_class = MIMAEConfig
    # V predicts a variance that is divided by; bfloat16 weights would not do
    _keep_in_fp32_modules_strict = ("approximator",)
    # `Trainer` is told that the losses are means over a batch; else it would not average them over accumulated batches
    accepts_loss_kwargs = False

    def post_init(self):
        # The official MAE draws q, k and v as one linear layer of 3D outputs. `_init_weights` reads it off the layers:
        # transformers does not call it for modules that, like the attention, own no parameters themselves.
        for module in self.modules():
            if isinstance(module, ViTMAEAttention):
                for projection in (module.q_proj, module.k_proj, module.v_proj):
                    projection.initial_fan_out = 3 * projection.out_features
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear):
            bound = (6 / (module.in_features + getattr(module, "initial_fan_out", module.out_features))) ** 0.5
            if hasattr(module, "initial_std"):
                init.trunc_normal_(module.weight, std=module.initial_std)
            else:
                init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.constant_(module.bias, getattr(module, "initial_bias", 0.0))
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            # the patch projection, (D, C, p, p): xavier-uniform as the linear layer over P values that it is
            bound = (6 / (module.weight.shape[0] + module.weight[0].numel())) ** 0.5
            init.uniform_(module.weight, -bound, bound)
            init.zeros_(module.bias)
        elif isinstance(module, ViTMAEEmbeddings):
            init.normal_(module.cls_token, std=self.config.initializer_range)
            init.copy_(module.position_embeddings, self._positions(self.config.hidden_size))
        elif isinstance(module, ViTMAEDecoder):
            init.normal_(module.mask_token, std=self.config.initializer_range)
            init.copy_(module.decoder_pos_embed, self._positions(self.config.decoder_hidden_size))
        elif isinstance(module, InformationGate):
            init.zeros_(module.is_open)

    def _positions(self, width: int) -> torch.Tensor:
        return sincos_positions(self.config.grid_size, width)

    def freeze_fixed_parameters(self):
        """Positions are not learned, nor is V in ablation (d); loading a checkpoint would make them trainable."""
        for module in self.modules():
            if isinstance(module, ViTMAEEmbeddings):
                module.position_embeddings.requires_grad_(False)
            elif isinstance(module, ViTMAEDecoder):
                module.decoder_pos_embed.requires_grad_(False)
            elif isinstance(module, GaussianApproximator):
                module.requires_grad_(self.config.train_approximator)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers; in addition, what is fixed stays fixed."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze_fixed_parameters()
        return loaded

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs):
        """As in transformers, but files hold the names of `state_dict()`, and `AutoModel` finds the encoder in them.

        The way back to transformers 4's names is not one-to-one: it would write `decoder.decoder_encoder.layer.*`.
        transformers notes the saved class alone in `auto_map`.
        """
        encoder = f"{MIMAEModel.__module__.rsplit('.', 1)[-1]}.{MIMAEModel.__name__}"
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), "AutoModel": encoder}
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)


class MIMAEModel(MIMAEPreTrainedModel, ViTMAEModel):
    """The encoder. `forward` and `encode` see the whole image and are deterministic; `forward_masked` sees views."""

    # any checkpoint is loaded for its encoder without a word about the rest
    _keys_to_ignore_on_load_unexpected = (
        r"^decoder\.",
        r"^approximator\.",
        r"^mi_gate\.",
        r"^pooler\.",  # of the stock ViT
        r"^fc_norm\.",
        r"^classifier\.",
    )

    def __init__(self, config: MIMAEConfig):
        ViTMAEPreTrainedModel.__init__(self, config)
        self.embeddings = MIMAEEmbeddings(config)
        self.layers = nn.ModuleList(ViTMAELayer(config) for _ in range(config.num_hidden_layers))
        for depth, layer in enumerate(self.layers):
            rate = config.drop_path_rate * depth / max(1, config.num_hidden_layers - 1)
            if rate > 0:  # both residual branches of a layer end in its dropout
                layer.dropout = nn.Sequential(layer.dropout, Dinov2DropPath(rate))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()
        self.freeze_fixed_parameters()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs
    ) -> MIMAEModelOutput:
        """Features of the whole image. Unlike ViTMAE's, never masked.

        Args:
            pixel_values: (B, C, H, W), normalised.
            interpolate_pos_encoding: take images of another size than the configuration's.

        Raises:
            ValueError: see `MIMAEEmbeddings.embed_patches`.
        """
        patches = self.embeddings.embed_patches(pixel_values, interpolate_pos_encoding)  # (B, L, D)
        latent = self._encode_sequence(self.embeddings.prepend_class_token(patches), **kwargs)  # (B, 1+L, D)
        grid_size = [side // self.config.patch_size for side in pixel_values.shape[-2:]]
        return MIMAEModelOutput(
            last_hidden_state=latent,
            pooler_output=pool_tokens(latent, self.config.latent_pooling),
            feature_map=latent[:, 1:].transpose(1, 2).unflatten(2, grid_size),
        )

    def encode(self, pixel_values: torch.Tensor) -> MIMAEModelOutput:
        """Unmasked features of images of any size that the patches divide: what evaluation uses, for every model."""
        return self(pixel_values, interpolate_pos_encoding=True)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward_masked(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> MIMAEMaskedOutput:
        """N masked views of each image through the encoder; the patches are embedded once.

        Args:
            pixel_values: (B, C, H, W), normalised.
            noise: (B, L), or (B, N, L) for independent masks: what the masks are cut from; None = drawn here.

        Raises:
            ValueError: see `MIMAEEmbeddings.embed_patches`; noise of another shape than `config.mask_strategy` needs.
        """
        config = self.config
        patches = self.embeddings.embed_patches(pixel_values, interpolate_pos_encoding)  # (B, L, D)
        batch_size, num_patches, _ = patches.shape
        views_of_noise = (config.num_views,) if config.mask_strategy == "independent" else ()
        noise_shape = (batch_size, *views_of_noise, num_patches)
        if noise is None:
            noise = torch.rand(noise_shape, device=patches.device)
        elif noise.shape != noise_shape:
            raise ValueError(f"noise {tuple(noise.shape)} must be {noise_shape} for {config.mask_strategy} masks")
        num_visible = num_visible_patches(num_patches, config.mask_ratio, config.num_masks)
        ids_shuffle = multi_mask_ids(noise, config.num_views, num_visible)  # (B, N, L)
        mask, ids_restore = masks_from_ids(ids_shuffle, num_visible)

        views = patches.unsqueeze(1).expand(-1, config.num_views, -1, -1)  # (B, N, L, D), not copied
        visible_embeddings = gather_patches(views, ids_shuffle[..., :num_visible])  # (B, N, V, D)
        sequence = self.embeddings.prepend_class_token(visible_embeddings.flatten(0, 1))  # (B·N, 1+V, D)
        return MIMAEMaskedOutput(
            last_hidden_state=self._encode_sequence(sequence, **kwargs),
            visible_embeddings=visible_embeddings,
            mask=mask,
            ids_restore=ids_restore,
        )

    def _encode_sequence(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return self.layernorm(hidden_states)


class MIMAEForPreTraining(MIMAEPreTrainedModel, ViTMAEForPreTraining):
    """MI-MAE's pre-training objective (Eq. 11) over encoder, decoder and the approximator V."""

    def __init__(self, config: MIMAEConfig):
        ViTMAEPreTrainedModel.__init__(self, config)
        self.vit = MIMAEModel(config)
        self.decoder = MIMAEDecoder(config, num_patches=config.num_patches)
        self.approximator = (
            GaussianApproximator(
                in_features=config.hidden_size,
                out_features=config.hidden_size,
                hidden_features=config.approximator_hidden_size or config.hidden_size,
                variance_eps=config.approximator_variance_eps,
            )
            if config.mi_min_weight > 0
            else None
        )
        self.mi_gate = InformationGate(config.mi_gate_threshold, config.mi_gate_mode)
        self.post_init()
        self.freeze_fixed_parameters()

    def encode(self, pixel_values: torch.Tensor) -> MIMAEModelOutput:
        """Unmasked features of the encoder; see `MIMAEModel.encode`."""
        return self.vit.encode(pixel_values)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> MIMAEForPreTrainingOutput:
        """Algorithm 1 for one batch.

        Args:
            pixel_values: (B, C, H, W), normalised.
            noise: (B, L), or (B, N, L) for independent masks: what the masks are cut from; None = drawn here.
            interpolate_pos_encoding: take images of another size than the configuration's.

        Raises:
            ValueError: see `MIMAEEmbeddings.embed_patches` and `multi_mask_ids`.
        """
        config = self.config
        views = self.vit.forward_masked(pixel_values, noise, interpolate_pos_encoding, return_dict=True, **kwargs)
        grid_size = tuple(side // config.patch_size for side in pixel_values.shape[-2:])
        logits = self.decoder(views.last_hidden_state, views.ids_restore, grid_size, config.grid_size)

        latent = views.last_hidden_state.unflatten(0, views.mask.shape[:2])  # (B, N, 1+V, D)
        latent_vector = pool_tokens(latent, config.latent_pooling)  # (B, N, D)
        reconstruction_loss = self.reconstruction_loss(pixel_values, logits, views.mask)
        terms = self.information_terms(latent_vector, views.visible_embeddings)
        gate = self.mi_gate(reconstruction_loss)

        # Eq. 11; the decoder is moved by L_rec alone, the encoder by the objective, V by L_approx alone
        information = config.mi_max_weight * terms.mi_max_loss + config.mi_min_weight * terms.mi_min_loss
        objective = config.reconstruction_weight * reconstruction_loss + gate * information
        loss = objective + terms.approximation_loss if config.train_approximator else objective

        return MIMAEForPreTrainingOutput(
            loss=loss,
            objective=objective,
            reconstruction_loss=reconstruction_loss,
            mi_max_loss=terms.mi_max_loss,
            mi_min_loss=terms.mi_min_loss,
            approximation_loss=terms.approximation_loss,
            mi_active=gate,
            logits=logits,
            mask=views.mask,
            ids_restore=views.ids_restore,
            latent_vector=latent_vector,
            latent_norm=terms.latent_norm,
            min_variance=terms.min_variance,
            dead_variance_fraction=terms.dead_variance_fraction,
            hidden_states=views.hidden_states,
            attentions=views.attentions,
        )

    def patchify(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = True) -> torch.Tensor:
        """(B, C, H, W) → (B, L, P), of any size that the patches divide; ViTMAE's by default refuses rectangles."""
        return super().patchify(pixel_values, interpolate_pos_encoding)

    def unpatchify(self, patches: torch.Tensor, original_image_size: tuple[int, int] | None = None) -> torch.Tensor:
        """(B, L, P) → (B, C, H, W), of the configuration's size unless (height, width) is given."""
        return super().unpatchify(patches, original_image_size or self.config.image_size_2d)

    def reconstruction_loss(
        self, pixel_values: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Eq. 1: mean squared error of a patch, averaged over the masked patches of each view, then over views."""
        target = self.reconstruction_target(pixel_values).unsqueeze(1)  # (B, 1, L, P)
        per_patch = (logits.float() - target).square().mean(dim=-1)  # (B, N, L)
        per_view = (per_patch * mask).sum(dim=-1) / mask.sum(dim=-1)  # (B, N)
        return per_view.mean()

    def reconstruction_target(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels by patch (B, L, P), float32, each patch normalised by its own statistics under `norm_pix_loss`."""
        target = self.patchify(pixel_values.float())
        if not self.config.norm_pix_loss:
            return target
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        return (target - mean) / (variance + 1.0e-6).sqrt()

    def information_terms(self, latent_vector: torch.Tensor, visible_embeddings: torch.Tensor) -> InformationTerms:
        """Eq. 7-10 on ẑ (B, N, D) and X_j (B, N, V, D)."""
        config = self.config
        pooled = config.approximator_unit == "pooled"
        return information_terms(
            latent_vector,
            visible_embeddings.mean(dim=2) if pooled else visible_embeddings,
            self.approximator,
            temperature=config.temperature if config.mi_max_weight > 0 else None,
            gather_negatives=config.gather_negatives,
            reduction=config.mi_reduction,
        )


class MIMAEForImageClassification(MIMAEPreTrainedModel):
    """The encoder with a linear classifier, for fine-tuning as the official MAE does it.

    With `classifier_pooling="mean"` the patch tokens are averaged before they are normalised: `fc_norm` takes the
    place of the encoder's last LayerNorm, which is gone.
    """

    # a checkpoint is loaded for its encoder without a word about the rest
    _keys_to_ignore_on_load_unexpected = (
        r"^decoder\.",
        r"^approximator\.",
        r"^mi_gate\.",
        r"^(vit\.)?pooler\.",  # of the stock ViT
        r"^(vit\.)?layernorm\.",  # where the patches are averaged first
    )

    def __init__(self, config: MIMAEConfig):
        super().__init__(config)
        self.vit = MIMAEModel(config)
        if config.classifier_pooling == "mean":
            self.vit.layernorm = nn.Identity()
            self.fc_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        else:
            self.fc_norm = nn.Identity()
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.classifier.initial_std = 2e-5
        self.post_init()
        self.freeze_fixed_parameters()

    def freeze_fixed_parameters(self):
        """Nothing is fixed: fine-tuning moves the positions, too, as in the official MAE."""
        self.vit.embeddings.position_embeddings.requires_grad_(True)

    def encode(self, pixel_values: torch.Tensor) -> MIMAEModelOutput:
        """Features as `MIMAEModel.encode`'s, but that `pooler_output` (B, D) is what the classifier sees."""
        output = self.vit.encode(pixel_values)
        output.pooler_output = self._pool(output.last_hidden_state)
        return output

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> ImageClassifierOutput:
        """Logits (B, K), and their loss where there are labels.

        Args:
            pixel_values: (B, C, H, W), normalised.
            labels: classes (B,), those of -100 left out, or probabilities (B, K), as mixup makes them.
            interpolate_pos_encoding: take images of another size than the configuration's.

        Raises:
            ValueError: see `MIMAEEmbeddings.embed_patches`.
        """
        output = self.vit(pixel_values, interpolate_pos_encoding, return_dict=True, **kwargs)
        logits = self.classifier(self._pool(output.last_hidden_state))  # (B, K)
        return ImageClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels),
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _pool(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc_norm(pool_tokens(tokens, self.config.classifier_pooling))


def classification_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (B, K), a mean over the images; labels are classes (B,) or probabilities (B, K).

    Classes of -100 do not count; where all are -100 the loss is 0.
    """
    logits = logits.float()
    if labels.is_floating_point():
        return nn.functional.cross_entropy(logits, labels)
    count = (labels != -100).sum().clamp(min=1)
    return nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / count


MIMAEConfig.register_for_auto_class()
MIMAEModel.register_for_auto_class("AutoModel")
MIMAEForPreTraining.register_for_auto_class("AutoModelForPreTraining")
MIMAEForImageClassification.register_for_auto_class("AutoModelForImageClassification")
