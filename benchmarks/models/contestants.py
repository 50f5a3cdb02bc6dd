"""Contestants in training: a model, its optimiser, and a batch of random images that lies on the device."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mimae import MIMAEConfig
from mimae.hub.official_mae import PLAIN_MAE
from mimae.training.attention import default_attention
from mimae.training.optimization import build_adamw

from .peers import PEERS, Ours

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


@dataclass(frozen=True)
class Setting:
    """What all contestants have in common.

    Args:
        preset: size of the model.
        views: of a step; an image of ours has N, an image of the others one.
        device: where they train.
        precision: "float32", or "bf16" for autocast as accelerate and `Trainer` have it.
        fields: of the configuration, in place of the preset's.
        compiled: whether the models are.
    """

    preset: str
    views: int
    device: torch.device
    precision: str
    fields: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False


class Contestant:
    """A model in training, by its name in `OURS` or `PEERS`."""

    def __init__(self, name: str, setting: Setting):
        torch.manual_seed(0)
        self.setting, device = setting, setting.device
        own = OURS.get(name, PLAIN_MAE)
        config = MIMAEConfig.preset(setting.preset, **setting.fields, **own)
        if name in OURS:  # as the pre-training script chooses
            config._attn_implementation = default_attention(device, PRECISIONS[setting.precision])
        self.model: Any = (PEERS.get(name) or Ours)(config).to(device).train()
        self.optimizer = build_adamw(_Decaying(self.model), weight_decay=0.05, betas=(0.9, 0.95))
        if setting.compiled:
            self.model.compile()
        self.images = torch.randn(setting.views // config.num_views, 3, *config.image_size_2d, device=device)
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

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.setting.precision == "float32":
            return nullcontext()
        return torch.autocast(self.setting.device.type, dtype=torch.bfloat16)


class _Decaying(nn.Module):
    """A model as `build_adamw` wants it, which says what else does not decay: nothing."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def no_weight_decay(self) -> set[str]:
        return set()


@contextmanager
def contestants(names: Sequence[str], setting: Setting) -> Iterator[dict[str, Contestant]]:
    """Several that are to take turns; afterwards their memory is free again."""
    found = {name: Contestant(name, setting) for name in names}
    try:
        yield found
    finally:
        found.clear()
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
