"""The official MAE (facebookresearch/mae, models_mae.py) stated anew: its modules under its names, of timm's parts.

It shares no code with this project's model, and does what the official one does: patches are gathered by indices
repeated to full width, mask tokens are unshuffled into their places, every patch is predicted.

Shapes: B images, L patches, V visible patches, D width, P values of a patch.
"""

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block, PatchEmbed
from torch import nn


class OfficialMAE(nn.Module):
    """Encoder and decoder, and the loss of masked images.

    Args:
        image_size: (height, width) in pixels.
        decoder: its width, depth and heads; None for the encoder alone.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: int,
        channels: int,
        *,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        decoder: tuple[int, int, int] | None,
    ):
        super().__init__()
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)  # timm says a type
        block = partial(Block, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm_layer)
        self.patch_size = patch_size
        self.patch_embed = PatchEmbed(image_size, patch_size, channels, width)
        num_tokens = 1 + self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, width), requires_grad=False)
        self.blocks = nn.ModuleList(block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if decoder:
            decoder_width, decoder_depth, decoder_heads = decoder
            self.decoder_embed = nn.Linear(width, decoder_width)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
            self.decoder_pos_embed = nn.Parameter(torch.zeros(1, num_tokens, decoder_width), requires_grad=False)
            self.decoder_blocks = nn.ModuleList(block(decoder_width, decoder_heads) for _ in range(decoder_depth))
            self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
            self.decoder_pred = nn.Linear(decoder_width, patch_size**2 * channels)

    def forward(self, images: torch.Tensor, noise: torch.Tensor, num_visible: int) -> torch.Tensor:
        """The loss of images (B, C, H, W), of which noise (B, L) leaves V patches visible; targets are normalised."""
        shuffle = noise.argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        patches = self.patch_embed(images) + self.pos_embed[:, 1:]
        tokens = self.encode(self.at(patches, shuffle[:, :num_visible]))
        predicted = self.pixels(tokens, num_visible, restore)
        mask = (restore >= num_visible).float()
        per_patch = (predicted - self.targets(images)).square().mean(dim=-1)  # (B, L)
        return (per_patch * mask).sum() / mask.sum()

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Of whole images: (B, C, H, W) → (B, 1+L, D)."""
        return self.encode(self.patch_embed(images) + self.pos_embed[:, 1:])

    def encode(self, patches: torch.Tensor) -> torch.Tensor:
        """Embedded patches (B, V, D) → (B, 1+V, D)."""
        class_token = self.cls_token + self.pos_embed[:, :1]
        tokens = torch.cat([class_token.expand(len(patches), -1, -1), patches], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def pixels(self, tokens: torch.Tensor, num_visible: int, restore: torch.Tensor | None = None) -> torch.Tensor:
        """Every patch from the class token and the first V of the others: (B, 1+…, D) → (B, L, P).

        Args:
            restore: (B, L), where each patch lies among visible and masked ones; None: those are the first V.
        """
        tokens = self.decoder_embed(tokens[:, : 1 + num_visible])
        num_masked = self.decoder_pos_embed.shape[1] - tokens.shape[1]
        patches = torch.cat([tokens[:, 1:], self.mask_token.repeat(len(tokens), num_masked, 1)], dim=1)
        if restore is not None:
            patches = self.at(patches, restore)
        tokens = torch.cat([tokens[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens))[:, 1:]

    def targets(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels of each patch, (B, L, P), normalised by the patch's own mean and deviation."""
        batch, channels, height, width = images.shape
        side = self.patch_size
        squares = images.reshape(batch, channels, height // side, side, width // side, side)
        patches = torch.einsum("bchpwq->bhwpqc", squares).reshape(batch, -1, side * side * channels)
        mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6) ** 0.5

    @staticmethod
    def at(sequence: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The tokens (B, K, D) of a sequence (B, L, D) at ids (B, K)."""
        return torch.gather(sequence, 1, ids.unsqueeze(-1).repeat(1, 1, sequence.shape[-1]))
