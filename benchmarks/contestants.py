"""Contestants in training: a model, its optimiser, and a batch of random images that lies on the device."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from mimae import MIMAEConfig
from mimae.hub.official_mae import PLAIN_MAE
from mimae.training.attention import default_attention
from mimae.training.optimization import build_adamw

from .peers import PEERS, Ours, plain_config

FULL = "MI-MAE, N = 4"
PLAIN = "MAE, N = 1"
WITHOUT_TERMS = "MAE, N = 4"
_WITHOUT = {"mi_max_weight": 0.0, "mi_min_weight": 0.0}
OURS: dict[str, dict[str, Any]] = {
    PLAIN: PLAIN_MAE,
    WITHOUT_TERMS: {"num_masks": 4, **_WITHOUT},
    FULL: {"num_masks": 4, "mi_gate_threshold": None},
    "MI-MAE, N = 8": {"num_masks": 8, "mi_gate_threshold": None},
    "MI-MAE, N = 10": {"num_masks": 10, "mi_gate_threshold": None},
}
SMALL = {"image_size": 64, "num_hidden_layers": 2, "decoder_num_hidden_layers": 1}  # of a rehearsal's models
PRECISIONS = {"float32": "no", "bf16": "bf16"}  # to accelerate's words


class Contestant:
    """A model in training.

    Args:
        name: of `OURS` or `PEERS`.
        views: of a step; an image of ours has N, an image of the others one.
        precision: "float32", or "bf16" for autocast as accelerate and `Trainer` have it.
        fields: of the configuration, in place of the preset's.
    """

    def __init__(
        self,
        name: str,
        preset: str,
        views: int,
        device: torch.device,
        precision: str,
        fields: dict[str, Any],
        *,
        compiled: bool = False,
    ):
        torch.manual_seed(0)
        self.device, self.precision, self.views = device, precision, views
        config = MIMAEConfig.preset(preset, **fields, **OURS[name]) if name in OURS else plain_config(preset, **fields)
        if name in OURS:  # as the pre-training script chooses
            config._attn_implementation = default_attention(device, PRECISIONS[precision])
        self.model = (PEERS.get(name) or Ours)(config).to(device).train()
        self.optimizer = build_adamw(_Decaying(self.model), weight_decay=0.05, betas=(0.9, 0.95))
        if compiled:
            self.model.compile()
        self.images = torch.randn(views // config.num_views, 3, *config.image_size_2d, device=device)
        self.noise = torch.rand(len(self.images), config.num_patches, device=device)

    def forward(self) -> None:
        """The loss alone."""
        with torch.no_grad(), self._autocast():
            self.model(self.images, self.noise)

    def step(self) -> None:
        """Forward, backward, what each does with the gradient's norm, fused AdamW."""
        with self._autocast():
            loss = self.model(self.images, self.noise)
        loss.backward()
        self.model.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _autocast(self) -> AbstractContextManager:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


class _Decaying(nn.Module):
    """A model as `build_adamw` wants it, which says what else does not decay: nothing."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def no_weight_decay(self) -> set[str]:
        return set()


@contextmanager
def contestants(
    names: Sequence[str],
    preset: str,
    views: int,
    device: torch.device,
    precision: str,
    fields: dict[str, Any],
    *,
    compiled: bool = False,
) -> Iterator[dict[str, Contestant]]:
    """Several with the same number of views a step; afterwards their memory is free again."""
    found = {name: Contestant(name, preset, views, device, precision, fields, compiled=compiled) for name in names}
    try:
        yield found
    finally:
        found.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
