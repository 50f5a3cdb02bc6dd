"""Whom the training step is compared with, each as a module of (images, noise) → loss, on the same weights.

Shapes: B images, N masks, L patches, V visible patches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightly.models import utils
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mimae import MIMAEConfig, MIMAEForPreTraining
from mimae.hub.official_mae import PLAIN_MAE, official_state
from mimae.masking import num_visible_patches
from mimae.training.optimization import clip_gradients

from .official_mae import OfficialMAE

TRAINER_MAX_GRAD_NORM = 1.0  # transformers' default, which its example script leaves as it is


class Ours(nn.Module):
    """This project's model as its trainer calls it."""

    return_logits = False

    def __init__(self, config: MIMAEConfig):
        super().__init__()
        self.model = MIMAEForPreTraining(config)

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.model(images, noise=noise, return_logits=self.return_logits).loss

    def clip(self) -> None:
        """The trainer clips nothing, but logs the norm of the gradient."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        clip_gradients(trained, [], None)


class Stock(nn.Module):
    """transformers' ViTMAE as its example script runs it."""

    def __init__(self, config: MIMAEConfig):
        super().__init__()
        fields = ViTMAEConfig().to_dict().keys() - {"architectures", "model_type", "transformers_version"}
        known = {name: getattr(config, name) for name in fields if hasattr(config, name)}
        self.model = ViTMAEForPreTraining(ViTMAEConfig(**known))

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.model(images, noise=noise).loss

    def clip(self) -> None:
        """`Trainer` clips."""
        nn.utils.clip_grad_norm_(self.parameters(), TRAINER_MAX_GRAD_NORM)

    def take(self, plain: MIMAEForPreTraining) -> None:
        """The weights of ours."""
        state = plain.state_dict()
        self.model.load_state_dict({name: state[name] for name in self.model.state_dict()})


class Official(nn.Module):
    """facebookresearch/mae, see `OfficialMAE`."""

    def __init__(self, config: MIMAEConfig):
        super().__init__()
        self.num_visible = visible_patches(config)
        self.model = OfficialMAE(
            config.image_size_2d,
            config.patch_size,
            config.num_channels,
            width=config.hidden_size,
            depth=config.num_hidden_layers,
            heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            decoder=(
                config.decoder_hidden_size,
                config.decoder_num_hidden_layers,
                config.decoder_num_attention_heads,
            ),
        )

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.model(images, noise, self.num_visible)

    def clip(self) -> None:
        """The official recipe has no clipping."""

    def take(self, plain: MIMAEForPreTraining) -> None:
        """The weights of ours."""
        self.model.load_state_dict(official_state(plain))


class Lightly(nn.Module):
    """MAE put together of lightly's modules, the way its documentation does; targets normalised as in all others."""

    def __init__(self, config: MIMAEConfig):
        super().__init__()
        self.patch_size, self.num_visible = config.patch_size, visible_patches(config)
        vit = VisionTransformer(
            img_size=config.image_size_2d,
            patch_size=config.patch_size,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            num_classes=0,
        )
        width = config.decoder_hidden_size
        self.encoder = MaskedVisionTransformerTIMM(vit)
        self.embed = nn.Linear(config.hidden_size, width)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            config.num_patches,
            width,
            config.decoder_num_hidden_layers,
            config.decoder_num_attention_heads,
            mlp_ratio=config.decoder_intermediate_size / width,
        )
        self.head = nn.Linear(width, config.patch_size**2 * config.num_channels)

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        ids = nn.functional.pad(noise.argsort(dim=1) + 1, (1, 0))  # (B, 1+L): token 0 is the class token
        keep, masked = ids.tensor_split([1 + self.num_visible], dim=1)
        visible = self.embed(self.encoder.encode(images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, ids.shape)
        tokens = utils.set_at_index(tokens, keep, visible.type_as(tokens))
        predicted = self.head(utils.get_at_index(self.decoder(tokens), masked))
        patches = utils.get_at_index(utils.patchify(images, self.patch_size), masked - 1)
        return nn.functional.mse_loss(predicted, utils.normalize_mean_var(patches))

    def clip(self) -> None:
        """lightly's example has no clipping."""

    def take(self, plain: MIMAEForPreTraining) -> None:
        """The weights of ours."""
        state = official_state(plain)
        decoder = {name.removeprefix("decoder_"): value for name, value in state.items() if "decoder_" in name}
        decoder["mask_token"] = state["mask_token"]
        of_vit, of_decoder = self.encoder.vit.state_dict(), self.decoder.state_dict()
        self.encoder.vit.load_state_dict({name: state[name] for name in of_vit})
        self.decoder.load_state_dict({name: decoder[name] for name in of_decoder})
        for layer, name in ((self.embed, "embed"), (self.head, "pred")):
            layer.load_state_dict({part: decoder[f"{name}.{part}"] for part in ("weight", "bias")})


PEERS: dict[str, Callable[[MIMAEConfig], nn.Module]] = {
    "transformers": Stock,
    "official": Official,
    "lightly": Lightly,
}


def visible_patches(config: MIMAEConfig) -> int:
    """V."""
    return num_visible_patches(config.num_patches, config.mask_ratio, config.num_masks)


def plain_config(preset: str, **fields: object) -> MIMAEConfig:
    """MAE: one mask, no information terms."""
    return MIMAEConfig.preset(preset, **PLAIN_MAE, **fields)


@dataclass(frozen=True)
class Disagreement:
    """How far a peer's loss is from ours on the same weights, images and noise, relative to ours."""

    peer: str
    relative: float


@torch.no_grad()
def check_peers(config: MIMAEConfig, names: list[str], device: torch.device, tolerance: float) -> list[Disagreement]:
    """Compares every peer's loss with ours, on weights that are ours.

    Raises:
        AssertionError: a peer computes something else; it must not be timed.
    """
    torch.manual_seed(0)
    ours = Ours(config).to(device)
    images = torch.randn(2, config.num_channels, *config.image_size_2d, device=device)
    noise = torch.rand(2, config.num_patches, device=device)
    expected = ours(images, noise)
    found = []
    for name in names:
        peer: Any = PEERS[name](config).to(device)
        peer.take(ours.model)
        found.append(Disagreement(name, float((peer(images, noise) - expected).abs() / expected)))
        assert found[-1].relative <= tolerance, f"{name} computes another loss: {found[-1].relative:.1e} from ours"
    return found
