"""The method, on any encoder: what `modeling_mimae` (ViT) and `modeling_misimmim` (Swin) share.

A mask has one entry for each *unit* of the image: a patch of the ViT, a block of patches of the Swin.

Symbols of the paper and of this file:

    code                 paper    shape
    pixel_values         X        (B, C, H, W)
    mask                 m_j      (B, N, L)      0 is keep, 1 is remove
    visible_embeddings   X_j      (B, N, V, D)   embeddings of the patches that a view sees
    latent_vector        ẑ_j      (B, N, D)      what the encoder makes of a view, as one vector
    logits               φ(X̂)     (B, N, L, P)

B images, N masks, L units, V visible patches per mask, D width, P = unit_size² · C values of a unit, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput, ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_mim import MIMConfigMixin
from .masking import masks_from_ids, multi_mask_ids, num_visible_patches
from .mutual_information import GaussianApproximator, InformationGate, InformationTerms, information_terms

ALWAYS_SET: Any = None  # what transformers wants as the default of an output that is always there

# a pre-training checkpoint is loaded for its encoder without warnings about these
PRETRAINING_PARTS = (r"^decoder\.", r"^approximator\.", r"^mi_gate\.")


@dataclass
class EncoderOutput(ModelOutput):
    """Features of the whole image.

    last_hidden_state: (B, T, D), all tokens, a class token first if there is one.
    pooler_output: (B, D).
    feature_map: (B, D, h, w).
    """

    last_hidden_state: torch.Tensor = ALWAYS_SET
    pooler_output: torch.Tensor = ALWAYS_SET
    feature_map: torch.Tensor = ALWAYS_SET
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class MaskedOutput(ModelOutput):
    """The masked views after the encoder.

    last_hidden_state: (B·N, T, D), all tokens that were encoded.
    latent_vector (B, N, D), visible_embeddings (B, N, V, D), mask and ids_restore (B, N, L).
    ids_visible (B, N, V), ids_masked (B, N, L-V): the units, in the order in which each mask takes them.
    hidden_states, attentions: over B·N.
    """

    last_hidden_state: torch.Tensor = ALWAYS_SET
    latent_vector: torch.Tensor = ALWAYS_SET
    visible_embeddings: torch.Tensor = ALWAYS_SET
    mask: torch.Tensor = ALWAYS_SET
    ids_restore: torch.Tensor = ALWAYS_SET
    ids_visible: torch.Tensor = ALWAYS_SET
    ids_masked: torch.Tensor = ALWAYS_SET
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class LossTerm(NamedTuple):
    """What a loss term is called by logs, cards and curves."""

    symbol: str  # in the paper
    source: str  # its equation there
    meaning: str  # in words, the title of its curve; "" = it has none


def logged() -> Any:
    """A field of a model's output: a scalar that is logged as its mean over steps and processes."""
    return field(default=None, metadata={"is_logged": True})


def loss_term(symbol: str, source: str, meaning: str = "") -> Any:
    """A field of a model's output: a loss term that is logged, drawn and shown by these words; see `LossTerm`."""
    return field(default=None, metadata={"is_logged": True, "loss_term": LossTerm(symbol, source, meaning)})


def loss_terms_of(output_class: Any) -> dict[str, LossTerm]:
    """The loss terms of an output by their fields, in their order."""
    return {each.name: each.metadata["loss_term"] for each in fields(output_class) if "loss_term" in each.metadata}


@dataclass
class MIMForPreTrainingOutput(ModelOutput):
    """Every loss term by name, unweighted but for the first two.

    loss: objective + approximation_loss, for the one backward.
    objective: Eq. 11, λ1·L_rec + gate·(λ2·L_max + λ3·L_min).
    reconstruction_loss, mi_max_loss, mi_min_loss, approximation_loss: Eq. 1, 8, 10, 9.
    mi_active: the gate, 0 where the information terms did not count, 1 where they did in full.
    logits (B, N, L, P), None if not asked for; mask and ids_restore (B, N, L), latent_vector (B, N, D).
    latent_norm: mean of ‖ẑ‖. min_variance, dead_variance_fraction: V's smallest variance, and the share of its
        variance units that are 0 on the whole batch (both 0 where there is no V).
    hidden_states, attentions: of the encoder, over B·N.
    """

    loss: torch.Tensor = logged()
    objective: torch.Tensor = loss_term("objective", "Eq. 11")
    reconstruction_loss: torch.Tensor = loss_term("L_rec", "Eq. 1", "Reconstruction")
    mi_max_loss: torch.Tensor = loss_term("L_max", "Eq. 7, InfoNCE", "Agreement between views (InfoNCE)")
    mi_min_loss: torch.Tensor = loss_term("L_min", "Eq. 10, CLUB bound", "Independence of views (CLUB)")
    approximation_loss: torch.Tensor = loss_term("L_approx", "Eq. 9", "Fit of the approximator")
    mi_active: torch.Tensor = logged()
    logits: torch.Tensor | None = None
    mask: torch.Tensor = ALWAYS_SET
    ids_restore: torch.Tensor = ALWAYS_SET
    latent_vector: torch.Tensor = ALWAYS_SET
    latent_norm: torch.Tensor = logged()
    min_variance: torch.Tensor = logged()
    dead_variance_fraction: torch.Tensor = logged()
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def patchify(images: torch.Tensor, unit_size: int) -> torch.Tensor:
    """Images (B, C, H, W) → squares (B, L, P), row by row; the values of each in the order (row, column, channel)."""
    squares = images.unflatten(3, (-1, unit_size)).unflatten(2, (-1, unit_size))  # (B, C, h, p, w, p)
    return squares.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(squares: torch.Tensor, unit_size: int, image_size: tuple[int, int]) -> torch.Tensor:
    """Squares (B, L, P) → images (B, C, H, W) of this (height, width): `patchify` undone."""
    rows, columns = (side // unit_size for side in image_size)
    squares = squares.unflatten(2, (unit_size, unit_size, -1)).unflatten(1, (rows, columns))  # (B, h, w, p, p, C)
    return squares.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def gather_patches(sequence: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Tokens (…, L, D) at ids (…, K) → (…, K, D); the index is expanded, never materialised at width D."""
    return sequence.gather(-2, ids.unsqueeze(-1).expand(*ids.shape, sequence.shape[-1]))


def draw_masks(
    config: MIMConfigMixin, batch_size: int, num_patches: int, noise: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, int]:
    """The masks of a batch, as `config` has them.

    Args:
        noise: (B, L), or (B, N, L) for independent masks: what the masks are cut from; None = drawn here.

    Returns:
        `ids_shuffle` (B, N, L), the visible units of each mask first, and V, how many they are.

    Raises:
        ValueError: noise of another shape than `config.mask_strategy` needs.
    """
    noise_shape = (batch_size, *config.noise_shape_of(num_patches))
    if noise is None:
        noise = torch.rand(noise_shape, device=device)
    elif noise.shape != noise_shape:
        raise ValueError(f"noise {tuple(noise.shape)} must be {noise_shape} for {config.mask_strategy} masks")
    num_visible = num_visible_patches(num_patches, config.mask_ratio, config.num_masks)
    return multi_mask_ids(noise, config.num_views, num_visible), num_visible


def check_image_size(
    config: MIMConfigMixin, image_size: tuple[int, int], interpolate_pos_encoding: bool, divisor: str
) -> None:
    """Raises a ValueError for images of another size than the configuration's, or that the model would cut off.

    Args:
        image_size: (height, width) in pixels.
        interpolate_pos_encoding: whether any size is taken that the divisor divides.
        divisor: name of the field of `config` that must divide it.
    """
    height, width = image_size
    if not interpolate_pos_encoding and (height, width) != config.image_size_2d:
        raise ValueError(
            f"image of {height} x {width} pixels, but the model was configured for {config.image_size_2d[0]} x "
            f"{config.image_size_2d[1]}; resize it, or pass interpolate_pos_encoding=True"
        )
    unit = getattr(config, divisor)
    if height % unit or width % unit:
        raise ValueError(f"image of {height} x {width} pixels is not divisible by {divisor}={unit}")


def init_linear(linear: nn.Linear, std: float | None) -> None:
    """Weights from a truncated N(0, std), or xavier-uniform where there is none; biases 0; unless there is a hint.

    transformers calls `_init_weights` only for modules with parameters of their own, so what the surrounding module
    knows is noted on the layer: `initial_fan_out`, of the larger layer that it is a part of, and `initial_bias`.
    """
    if std is not None:
        init.trunc_normal_(linear.weight, std=std)
    else:
        bound = (6 / (linear.in_features + getattr(linear, "initial_fan_out", linear.out_features))) ** 0.5
        init.uniform_(linear.weight, -bound, bound)
    if linear.bias is not None:
        init.constant_(linear.bias, getattr(linear, "initial_bias", 0.0))


class PatchEmbeddings(Protocol):
    """What the encoders' embeddings have in common."""

    def embed_patches(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """(B, C, H, W) → patches, images first."""


if TYPE_CHECKING:  # what the classes below are mixed into
    from transformers import PreTrainedModel as _StockModel
else:
    _StockModel = object


class MIMPreTrainedMixin(_StockModel):
    """Loading and saving, for all classes of both models. As a base it goes before transformers' class."""

    config: MIMConfigMixin
    config_class: type[MIMConfigMixin]
    if TYPE_CHECKING:  # transformers' own is annotated as a function that is no method

        def to(self, *args: Any, **kwargs: Any) -> Self: ...  # type: ignore[override]

    # V predicts a variance that is divided by; bfloat16 weights would not do
    _keep_in_fp32_modules_strict: Any = ("approximator",)
    # `Trainer` is told that the losses are means over a batch; else it would not average them over accumulated batches
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, InformationGate):
            for state in module.buffers():
                init.zeros_(state)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters with more than one dimension that do not decay, in timm's convention: none."""
        return set()

    def freeze_fixed_parameters(self) -> None:
        """V is not trained in ablation (d); loading a checkpoint would make it trainable."""
        for module in self.modules():
            if isinstance(module, GaussianApproximator):
                module.requires_grad_(self.config.train_approximator)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """As in transformers; in addition, what is fixed stays fixed, and V in float32 where it is new, too."""
        loaded: Any = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze_fixed_parameters()
        for module in model.modules():
            if isinstance(module, GaussianApproximator):
                module.float()
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but files hold the names of `state_dict()`, and `AutoModel` finds the encoder in them.

        The way back to transformers 4's names is not one-to-one: it would write `decoder.decoder_encoder.layer.*`.
        transformers notes the saved class alone in `auto_map`.
        """
        encoder = type(self.base_model)
        name = f"{encoder.__module__.rsplit('.', 1)[-1]}.{encoder.__name__}"
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), "AutoModel": name}
        super().save_pretrained(*args, **{"save_original_format": False, **kwargs})


class MIMEncoderMixin(MIMPreTrainedMixin):
    """The two ways to see an image: whole, and as N masked views.

    A model brings `embeddings`, `encode_views` and `modules_by_depth`.
    """

    embeddings: PatchEmbeddings

    encode_views: Callable[..., MaskedOutput]  # (patches, ids_visible, mask, …): all of the output but the masks
    modules_by_depth: Callable[[], list[nn.Module]]  # for layer decay: the embeddings, then the blocks

    def encode(self, pixel_values: torch.Tensor) -> EncoderOutput:
        """Unmasked features of images of other sizes, too: what evaluation uses, for every model."""
        return self(pixel_values, interpolate_pos_encoding=True)

    @can_return_tuple
    def forward_masked(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> MaskedOutput:
        """N masked views of each image through the encoder; the patches are embedded once.

        Args:
            pixel_values: (B, C, H, W), normalised.
            noise: (B, L), or (B, N, L) for independent masks: what the masks are cut from; None = drawn here.
            interpolate_pos_encoding: take images of another size than the configuration's.

        Raises:
            ValueError: see `check_image_size`, `draw_masks` and the embeddings' `embed_patches`.
        """
        config, (height, width) = self.config, pixel_values.shape[-2:]
        check_image_size(config, (height, width), interpolate_pos_encoding, divisor=config.unit_field)
        num_patches = (height // config.unit_size) * (width // config.unit_size)
        patches = self.embeddings.embed_patches(pixel_values, interpolate_pos_encoding)
        ids_shuffle, num_visible = draw_masks(config, len(patches), num_patches, noise, patches.device)
        ids_visible, ids_masked = ids_shuffle.tensor_split([num_visible], dim=-1)
        mask, ids_restore = masks_from_ids(ids_shuffle, num_visible)
        views = self.encode_views(patches, ids_visible, mask, return_dict=True, **kwargs)
        return MaskedOutput(
            **views, mask=mask, ids_restore=ids_restore, ids_visible=ids_visible, ids_masked=ids_masked
        )


class MIMForPreTrainingMixin(MIMPreTrainedMixin):
    """The pre-training objective (Eq. 11) over encoder, decoder and the approximator V.

    A model brings an encoder (`base_model`), `decode` and `pixel_error`.
    """

    base_model: MIMEncoderMixin
    output_class: ClassVar[type[MIMForPreTrainingOutput]] = MIMForPreTrainingOutput  # a further term is a field of it

    decode: Callable[[MaskedOutput, Sequence[int]], torch.Tensor]  # for a (height, width): logits (B, N, L, P)
    pixel_error: Callable[[torch.Tensor], torch.Tensor]  # of the difference of each pixel, in Eq. 1

    @property
    def scalars(self) -> tuple[str, ...]:
        """The fields of the output that are logged, in their order, which checkpoints of a training rely on."""
        return tuple(each.name for each in fields(self.output_class) if "is_logged" in each.metadata)

    @property
    def loss_terms(self) -> dict[str, LossTerm]:
        """The loss terms of the output, with their words."""
        return loss_terms_of(self.output_class)

    def build_information_parts(self, in_features: int) -> None:
        """V, whose input has this width, and the gate."""
        config = self.config
        self.approximator = (
            GaussianApproximator(
                in_features=in_features,
                out_features=config.hidden_size,
                hidden_features=config.approximator_hidden_size or config.hidden_size,
                variance_eps=config.approximator_variance_eps,
            )
            if config.mi_min_weight > 0
            else None
        )
        self.mi_gate = InformationGate(config.mi_gate_threshold, config.mi_gate_mode, config.mi_ramp_steps)

    def encode(self, pixel_values: torch.Tensor) -> EncoderOutput:
        """Unmasked features: the encoder's own `encode`."""
        return self.base_model.encode(pixel_values)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        return_logits: bool = True,
        **kwargs: Any,
    ) -> MIMForPreTrainingOutput:
        """Algorithm 1 for one batch.

        Args:
            pixel_values: (B, C, H, W), normalised.
            noise: (B, L), or (B, N, L) for independent masks: what the masks are cut from; None = drawn here.
            interpolate_pos_encoding: take images of another size than the configuration's.
            return_logits: also predict the visible units, which no loss needs; training goes without.

        Raises:
            ValueError: see `check_image_size` and `draw_masks`.
        """
        config = self.config
        views = self.base_model.forward_masked(
            pixel_values, noise, interpolate_pos_encoding, return_dict=True, **kwargs
        )
        if return_logits:
            logits = self.decode(views, pixel_values.shape[-2:])  # (B, N, L, P)
            predicted = gather_patches(logits, views.ids_masked)  # (B, N, L-V, P)
        else:
            logits, predicted = None, self.decode_masked(views, pixel_values.shape[-2:])

        reconstruction_loss = self.reconstruction_loss(pixel_values, predicted, views.ids_masked)
        terms = self.information_terms(views.latent_vector, views.visible_embeddings)
        gate = self.mi_gate(reconstruction_loss)

        # Eq. 11; the decoder is moved by L_rec alone, the encoder by the objective, V by L_approx alone
        information = config.mi_max_weight * terms.mi_max_loss + config.mi_min_weight * terms.mi_min_loss
        objective = config.reconstruction_weight * reconstruction_loss + gate * information
        loss = objective + terms.approximation_loss if config.train_approximator else objective

        return MIMForPreTrainingOutput(
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
            latent_vector=views.latent_vector,
            latent_norm=terms.latent_norm,
            min_variance=terms.min_variance,
            dead_variance_fraction=terms.dead_variance_fraction,
            hidden_states=views.hidden_states,
            attentions=views.attentions,
        )

    def decode_masked(self, views: MaskedOutput, image_size: Sequence[int]) -> torch.Tensor:
        """Pixels of the masked units alone, (B, N, L-V, P), in the order of `ids_masked`."""
        return gather_patches(self.decode(views, image_size), views.ids_masked)

    def patchify(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → (B, L, P), of any size that the units divide."""
        return patchify(pixel_values, self.config.unit_size)

    def unpatchify(self, patches: torch.Tensor, original_image_size: tuple[int, int] | None = None) -> torch.Tensor:
        """(B, L, P) → (B, C, H, W), of the configuration's size unless (height, width) is given."""
        return unpatchify(patches, self.config.unit_size, original_image_size or self.config.image_size_2d)

    def reconstruction_loss(
        self, pixel_values: torch.Tensor, predicted: torch.Tensor, ids_masked: torch.Tensor
    ) -> torch.Tensor:
        """Eq. 1: mean error of a unit's pixels, averaged over the masked units of each view, then over views.

        Every view has the same number of masked units, so that one mean over all is the same.

        Args:
            predicted: (B, N, L-V, P), of the masked units in the order of `ids_masked` (B, N, L-V).
        """
        targets = self.reconstruction_target(pixel_values).unsqueeze(1)  # (B, 1, L, P)
        targets = gather_patches(targets.expand(-1, predicted.shape[1], -1, -1), ids_masked)  # (B, N, L-V, P)
        return self.pixel_error(predicted.float() - targets).mean()

    def reconstruction_target(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels by unit (B, L, P), float32, each unit normalised by its own statistics under `norm_pix_loss`."""
        target = self.patchify(pixel_values.float())
        if not self.config.norm_pix_loss:
            return target
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        return (target - mean) / (variance + 1.0e-6).sqrt()

    def information_terms(self, latent_vector: torch.Tensor, visible_embeddings: torch.Tensor) -> InformationTerms:
        """Eq. 7-10 on ẑ (B, N, D) and X_j (B, N, V, D)."""
        config = self.config
        return information_terms(
            latent_vector,
            visible_embeddings.mean(dim=2) if config.approximator_unit == "pooled" else visible_embeddings,
            self.approximator,
            temperature=config.temperature if config.mi_max_weight > 0 else None,
            gather_negatives=config.gather_negatives,
            reduction=config.mi_reduction,
        )


class MIMForImageClassificationMixin(MIMPreTrainedMixin):
    """The encoder (`base_model`) with a linear `classifier`, for fine-tuning."""

    base_model: MIMEncoderMixin
    classifier: nn.Linear | nn.Identity

    def pool(self, output: EncoderOutput) -> torch.Tensor:
        """What the classifier sees of an image, (B, D)."""
        return output.pooler_output

    def encode(self, pixel_values: torch.Tensor) -> EncoderOutput:
        """Features as the encoder's own `encode`, but that `pooler_output` (B, D) is what the classifier sees."""
        output = self.base_model.encode(pixel_values)
        output.pooler_output = self.pool(output)
        return output

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Logits (B, K), and their `classification_loss` where there are labels.

        Args:
            pixel_values, interpolate_pos_encoding: as the encoder's.

        Raises:
            ValueError: see `check_image_size`.
        """
        output = self.base_model(pixel_values, interpolate_pos_encoding, return_dict=True, **kwargs)
        logits = self.classifier(self.pool(output))  # (B, K)
        return ImageClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels),
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


def classification_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (B, K), a mean over the images; labels are classes (B,) or probabilities (B, K), as of
    mixup. Classes of -100 do not count; where all are -100 the loss is 0.
    """
    logits = logits.float()
    if labels.is_floating_point():
        return nn.functional.cross_entropy(logits, labels)
    count = (labels != -100).sum().clamp(min=1)
    return nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / count
