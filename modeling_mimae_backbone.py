"""The encoder of MI-MAE as a backbone for dense prediction: feature maps, windows, relative positions, a pyramid.

It follows ViTDet (Li et al. 2022, arXiv 2203.16527) for detection, and MAE's use of BEiT (arXiv 2106.08254) for
segmentation. Shapes:

    B images, C channels, H, W their height and width; D width, A heads, d = D / A width of a head
    h, w rows and columns of the patch grid; T tokens, h · w of them or one more for the class token
    S side of a window in patches, M windows of an image
"""

from typing import Any

import torch
from torch import nn
from transformers import BackboneMixin
from transformers import initialization as init
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEAttention, ViTMAELayer, eager_attention_forward
from transformers.utils.output_capturing import capture_outputs

from .configuration_mimae import MIMAEConfig
from .modeling_mim import PRETRAINING_PARTS
from .modeling_mimae import MIMAEEmbeddings, MIMAEPreTrainedModel, build_blocks


def split_into_windows(tokens: torch.Tensor, window_size: int) -> torch.Tensor:
    """(B, h, w, D) → (B · M, S, S, D), windows row by row, padded with zeros at the right and bottom."""
    height, width = tokens.shape[1:3]
    tokens = nn.functional.pad(tokens, (0, 0, 0, -width % window_size, 0, -height % window_size))
    windows = tokens.unflatten(2, (-1, window_size)).unflatten(1, (-1, window_size))  # (B, h/S, S, w/S, S, D)
    return windows.transpose(2, 3).flatten(0, 2)


def join_windows(windows: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """(B · M, S, S, D) → (B, h, w, D): undoes `split_into_windows`, and removes its padding."""
    height, width = grid_size
    window_size = windows.shape[1]
    rows, columns = -(-height // window_size), -(-width // window_size)
    tokens = windows.unflatten(0, (-1, rows, columns)).transpose(2, 3)  # (B, h/S, S, w/S, S, D)
    return tokens.flatten(3, 4).flatten(1, 2)[:, :height, :width]


def offsets(side: int, device: torch.device) -> torch.Tensor:
    """Query minus key position along a side, counted from 0: (side, side), int64, in 0 … 2 · side - 2."""
    positions = torch.arange(side, device=device)
    return positions[:, None] - positions[None, :] + side - 1


def resize_bias(table: torch.Tensor, sides: tuple[int, int]) -> torch.Tensor:
    """A table (A, ·, ·) of a number for each vertical and horizontal offset, interpolated to (A, *sides)."""
    if table.shape[1:] == sides:
        return table
    return nn.functional.interpolate(table.unsqueeze(0), size=sides, mode="bilinear")[0]


def resize_embeddings(embeddings: torch.Tensor, length: int) -> torch.Tensor:
    """Embeddings (·, d) of offsets along a side, interpolated to (length, d)."""
    if len(embeddings) == length:
        return embeddings
    return nn.functional.interpolate(embeddings.T.unsqueeze(0), size=length, mode="linear")[0].T


def central(table: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """The offsets of a smaller side, which lie in the middle of a larger one's."""
    return table.narrow(dim, (table.shape[dim] - length) // 2, length)


class RelativePositionBias(nn.Module):
    """A number for each offset and head, as in BEiT; three more for the class token as query, as key, and as both.

    Args:
        grid_size: (h, w) that the offsets are of. For another grid the table is interpolated.
        is_window: do not interpolate: on a grid smaller than a window, offsets keep their meaning.
    """

    def __init__(self, num_heads: int, grid_size: tuple[int, int], *, has_class_token: bool, is_window: bool = False):
        super().__init__()
        self.is_window = is_window
        self.table = nn.Parameter(torch.zeros(num_heads, 2 * grid_size[0] - 1, 2 * grid_size[1] - 1))
        self.class_token = nn.Parameter(torch.zeros(num_heads, 3)) if has_class_token else None

    def forward(self, query: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """What is added to the attention of queries (B, A, T, d): (1, A, T, T)."""
        height, width = grid_size
        sides = (2 * height - 1, 2 * width - 1)
        if self.is_window:
            table = central(central(self.table, 1, sides[0]), 2, sides[1])
        else:
            table = resize_bias(self.table, sides)
        rows, columns = offsets(height, table.device), offsets(width, table.device)
        bias = table[:, rows[:, None, :, None], columns[None, :, None, :]]  # (A, h, w, h, w)
        bias = bias.flatten(3, 4).flatten(1, 2)  # (A, T, T)
        if self.class_token is not None:
            as_query, as_key, as_both = self.class_token[:, :, None, None].unbind(1)  # (A, 1, 1) each
            num_patches = height * width
            bias = torch.cat([as_key.expand(-1, num_patches, 1), bias], dim=2)
            first = torch.cat([as_both, as_query.expand(-1, 1, num_patches)], dim=2)
            bias = torch.cat([first, bias], dim=1)
        return bias.unsqueeze(0).to(query.dtype)


class RelativePositionEmbeddings(nn.Module):
    """An embedding for each vertical and for each horizontal offset, whose product with the query is the bias.

    ViTDet, Sec. 3, after MViTv2 (arXiv 2112.01526), Sec. 4.1. Heads share the embeddings; a class token has none.

    Args:
        grid_size, is_window: see `RelativePositionBias`.
    """

    def __init__(self, head_size: int, grid_size: tuple[int, int], *, is_window: bool = False):
        super().__init__()
        self.is_window = is_window
        self.height = nn.Parameter(torch.zeros(2 * grid_size[0] - 1, head_size))
        self.width = nn.Parameter(torch.zeros(2 * grid_size[1] - 1, head_size))

    def forward(self, query: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """What is added to the attention of queries (B, A, T, d): (B, A, T, T)."""
        num_class_tokens = query.shape[2] - grid_size[0] * grid_size[1]
        query = query[:, :, num_class_tokens:].unflatten(2, grid_size)  # (B, A, h, w, d)
        rows = self.between(self.height, grid_size[0]).to(query.dtype)  # (h, h, d)
        columns = self.between(self.width, grid_size[1]).to(query.dtype)  # (w, w, d)
        vertical = torch.einsum("bahwd,hkd->bahwk", query, rows)
        horizontal = torch.einsum("bahwd,wkd->bahwk", query, columns)
        bias = vertical.unsqueeze(-1) + horizontal.unsqueeze(-2)  # (B, A, h, w, h, w)
        return nn.functional.pad(bias.flatten(4, 5).flatten(2, 3), (num_class_tokens, 0, num_class_tokens, 0))

    def between(self, embeddings: torch.Tensor, side: int) -> torch.Tensor:
        """The embedding of each pair of positions along a side, (side, side, d)."""
        length = 2 * side - 1
        fitting = central(embeddings, 0, length) if self.is_window else resize_embeddings(embeddings, length)
        return fitting[offsets(side, embeddings.device)]


class MIMAEBackboneAttention(ViTMAEAttention):
    """Self-attention of a block, within windows where it has them, with relative positions where the model has them.

    As in ViTDet, the zeros that pad windows take part. If a window covers the whole grid, attention is global.
    """

    def __init__(self, config: MIMAEConfig, window_size: int | None):
        super().__init__(config)
        self.window_size = window_size
        is_window = window_size is not None
        grid_size = config.grid_size if window_size is None else (window_size, window_size)
        self.relative_position_bias = self.relative_positions = None
        if config.use_relative_position_bias:
            self.relative_position_bias = RelativePositionBias(
                self.num_attention_heads, grid_size, has_class_token=config.window_size is None, is_window=is_window
            )
        elif config.use_relative_position_embeddings:
            self.relative_positions = RelativePositionEmbeddings(self.head_dim, grid_size, is_window=is_window)

    def forward(  # type: ignore[override]  # only the blocks below call it
        self, hidden_states: torch.Tensor, attention_mask: None = None, *, grid_size: tuple[int, int], **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) → the same, and attention probabilities where the implementation gives them."""
        if self.window_size is None or self.window_size >= max(grid_size):
            return self.attend(hidden_states, grid_size, **kwargs)
        windows = split_into_windows(hidden_states.unflatten(1, grid_size), self.window_size)
        window = (self.window_size, self.window_size)
        output, weights = self.attend(windows.flatten(1, 2), window, **kwargs)
        return join_windows(output.unflatten(1, window), grid_size).flatten(1, 2), weights

    def attend(
        self, hidden_states: torch.Tensor, grid_size: tuple[int, int], **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of all tokens (B, T, D) of one grid to each other."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)  # (B, A, T, d)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        relative = self.relative_position_bias or self.relative_positions
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            None if relative is None else relative(query, grid_size),
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights


class MIMAEBackboneLayer(ViTMAELayer):
    """A block with the attention of this file."""

    def __init__(self, config: MIMAEConfig, window_size: int | None):
        super().__init__(config)
        self.attention = MIMAEBackboneAttention(config, window_size)


class MIMAEFeaturePyramid(nn.ModuleList):
    """Four maps (B, D, h, w) → 4, 2, 1 and 1/2 times as large, one from each (BEiT's code for UperNet)."""

    def __init__(self, width: int):
        def twice() -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)

        four_times = nn.Sequential(twice(), nn.BatchNorm2d(width), nn.GELU(), twice())
        super().__init__([four_times, twice(), nn.Identity(), nn.MaxPool2d(kernel_size=2)])

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Each map through its own level."""
        return tuple(level(feature_map) for level, feature_map in zip(self, feature_maps, strict=True))


class MIMAEBackbone(BackboneMixin, MIMAEPreTrainedModel):
    """The encoder for `AutoBackbone`, UperNet and Mask R-CNN: it gives feature maps, of images of any size.

    The maps are the blocks' outputs, without the encoder's last LayerNorm. Every parameter is trained, the positions
    too, as in fine-tuning.

    Raises:
        ValueError: `add_fpn` without four `out_indices`, or what else `MIMAEConfig` refuses of windows and positions.
    """

    # the rest of any checkpoint, the stock ViT's, too
    _keys_to_ignore_on_load_unexpected: Any = (
        *PRETRAINING_PARTS,
        *(r"^(vit\.)?pooler\.", r"^(vit\.)?layernorm\.", r"^fc_norm\.", r"^classifier\."),
    )

    def __init__(self, config: MIMAEConfig):
        config.validate_backbone()  # fields that `from_pretrained` has changed are not checked yet
        config.out_indices = config.out_indices  # `BackboneMixin` knows those alone that are named
        super().__init__(config)
        self.has_class_token = config.window_size is None  # it has no place in windows
        self.num_features = [config.hidden_size for _ in config.stage_names]
        self.embeddings = MIMAEEmbeddings(config)
        self.layers = build_blocks(config, lambda depth: MIMAEBackboneLayer(config, config.window_of_block(depth)))
        self.fpn = MIMAEFeaturePyramid(config.hidden_size) if config.add_fpn else None
        self.post_init()
        self.freeze_fixed_parameters()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BackboneOutput:
        """Feature maps of the stages that the configuration names.

        Args:
            pixel_values: (B, C, H, W), normalised.

        Returns:
            `feature_maps`, (B, D, h, w) each, or the pyramid's sizes with `add_fpn`.

        Raises:
            ValueError: patches do not divide the images; relative positions with flash attention.
        """
        self.check_attention()
        patch_size = self.config.patch_size
        grid_size = (pixel_values.shape[2] // patch_size, pixel_values.shape[3] // patch_size)
        hidden_states = self.embeddings.embed_patches(pixel_values, interpolate_pos_encoding=True)  # (B, h·w, D)
        if self.has_class_token:
            hidden_states = self.embeddings.prepend_class_token(hidden_states)
        stages = [hidden_states]
        for layer in self.layers:
            stages.append(layer(stages[-1], grid_size=grid_size, **kwargs))
        chosen = [stage for name, stage in zip(self.stage_names, stages, strict=True) if name in self.out_features]
        feature_maps = tuple(
            stage[:, int(self.has_class_token) :].transpose(1, 2).unflatten(2, grid_size) for stage in chosen
        )
        return BackboneOutput(feature_maps=feature_maps if self.fpn is None else self.fpn(feature_maps))

    def check_attention(self) -> None:
        """Raises a ValueError where the attention that was asked for would not see the relative positions."""
        uses_relative = self.config.use_relative_position_bias or self.config.use_relative_position_embeddings
        if uses_relative and "flash" in self.config._attn_implementation:
            raise ValueError(
                f"attn_implementation={self.config._attn_implementation!r} takes no relative positions: use sdpa"
            )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.ConvTranspose2d):  # torch's default, on the meta device, too
            bound = module.weight[0].numel() ** -0.5
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)
        elif isinstance(module, nn.BatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            for name, buffer in module.named_buffers():
                (init.ones_ if name == "running_var" else init.zeros_)(buffer)
        elif isinstance(module, RelativePositionBias | RelativePositionEmbeddings):
            for table in module.parameters(recurse=False):
                init.zeros_(table)

    def freeze_fixed_parameters(self) -> None:
        """Nothing is fixed but an unused class token: data-parallel training would wait for its gradient."""
        self.embeddings.position_embeddings.requires_grad_(True)
        self.embeddings.cls_token.requires_grad_(self.has_class_token)

    def modules_by_depth(self) -> list[nn.Module]:
        """For layer decay: the embeddings, then the blocks; the pyramid is in none of them."""
        return [self.embeddings, *self.layers]

    def no_weight_decay(self) -> set[str]:
        """Class token and positions, absolute or relative."""
        relative = {name for name, _ in self.named_parameters() if ".relative_position" in name}
        return {"embeddings.cls_token", "embeddings.position_embeddings", *relative}


MIMAEBackbone.register_for_auto_class("AutoBackbone")
