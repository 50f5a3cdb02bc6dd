"""Learning rate, parameter groups, and the update of one step."""

import math
from dataclasses import dataclass

import torch
from timm.optim import param_groups_weight_decay
from torch import nn


def scaled_learning_rate(
    base_learning_rate: float, images_per_step: int, num_views: int, batch_unit: str, base_batch: int
) -> float:
    """lr = base · batch / base_batch. By "views" the batch counts each masked view, by "images" each image.

    Sec. 5.1 calls 1024 images of four views "equivalent to 4096": views, the default.
    """
    batch = images_per_step * (num_views if batch_unit == "views" else 1)
    return base_learning_rate * batch / base_batch


@dataclass(frozen=True)
class WarmupCosine:
    """The learning rate of each optimiser step, counted from 0: linear to `peak`, then a half-cosine to `final`.

    As in the official MAE, which sets it per iteration; the first step's is 0.
    """

    peak: float
    final: float
    warmup_steps: int
    total_steps: int

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.final + (self.peak - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_adamw(model: nn.Module, *, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in two groups: biases and other vectors do not decay.

    Fused, because that variant takes `found_inf`: a step can be skipped on the device, without a host sync.
    """
    groups = param_groups_weight_decay(model, weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimiser's parameters, in its order."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]


def clip_gradients(
    parameters: list[nn.Parameter], approximator_parameters: list[nn.Parameter], max_norm: float | None
) -> torch.Tensor:
    """Clips in place and returns the norm of the gradient before clipping, a scalar on the device.

    V is clipped on its own: one norm over both would let V's gradient scale the encoder's step.
    """
    norms = []
    for group in filter(None, (parameters, approximator_parameters)):  # the norm of nothing would lie on the host
        norm = nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(group, max_norm, norm)
        norms.append(norm)
    return torch.stack(norms).norm()
