"""Learning rate, parameter groups, and the update of one step."""

import logging
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from .protocols import LayeredModel, OptimizedModel

logger = logging.getLogger(__name__)


def in_steps(steps: int | None, epochs: float, steps_per_epoch: int) -> int:
    """So many steps, or where there is no number of them those of so many epochs, at least one."""
    return steps or max(1, round(epochs * steps_per_epoch))


def scaled_learning_rate(
    base_learning_rate: float, images_per_step: int, num_views: int, batch_unit: str, base_batch: int
) -> float:
    """lr = base · batch / base_batch. By "views" the batch counts each masked view, by "images" each image.

    Sec. 5.1 calls 1024 images of four views "equivalent to 4096": views, the default.
    """
    batch = images_per_step * (num_views if batch_unit == "views" else 1)
    return base_learning_rate * batch / base_batch


@dataclass(frozen=True, kw_only=True)
class WarmupSchedule(ABC):
    """The learning rate of each optimiser step, counted from 0: linear from `start` to `peak`, then the subclass's.

    Set per step, as in the official MAE and SimMIM.
    """

    peak: float
    warmup_steps: int
    total_steps: int
    start: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps >= self.total_steps:
            logger.warning("the run of %d steps ends within its warm-up of %d", self.total_steps, self.warmup_steps)

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.start + (self.peak - self.start) * step / self.warmup_steps
        return self.after_warmup(step)

    @abstractmethod
    def after_warmup(self, step: int) -> float:
        """The learning rate of a step that follows the warm-up."""


@dataclass(frozen=True, kw_only=True)
class WarmupCosine(WarmupSchedule):
    """After the warm-up a half-cosine to `final`, as in the official MAE."""

    final: float

    def after_warmup(self, step: int) -> float:
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.final + (self.peak - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True, kw_only=True)
class WarmupPolynomial(WarmupSchedule):
    """After the warm-up (1 - progress) ** `power` of the way to `final` is left: mmsegmentation's "poly"."""

    power: float = 1.0
    final: float = 0.0

    def after_warmup(self, step: int) -> float:
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.final + (self.peak - self.final) * (1 - min(1.0, progress)) ** self.power


@dataclass(frozen=True, kw_only=True)
class WarmupMultiStep(WarmupSchedule):
    """After the warm-up `peak`, times `gamma` from each of the steps `milestones` on, as in the official SimMIM."""

    milestones: tuple[int, ...]
    gamma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if idle := [step for step in self.milestones if not self.warmup_steps <= step < self.total_steps]:
            logger.warning(
                "milestones at steps %s lie outside the %d steps after the warm-up of %d: the learning rate does not "
                "step down there",
                *(idle, self.total_steps - self.warmup_steps, self.warmup_steps),
            )

    def after_warmup(self, step: int) -> float:
        return self.peak * self.gamma ** sum(step >= milestone for milestone in self.milestones)


def build_adamw(model: OptimizedModel, *, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in two groups: vectors do not decay, nor what the model exempts.

    Fused, because that variant takes `found_inf`: a step can be skipped on the device, without a host sync.
    """
    undecayed = model.no_weight_decay()
    # timm asks for the named parameters of a module, and nothing else
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=undecayed)  # type: ignore[arg-type]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def build_finetuning_adamw(
    model: LayeredModel,
    *,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW over `layer_decay_groups`, whose learning rates are `learning_rate` · lr_scale."""
    groups = layer_decay_groups(model, weight_decay=weight_decay, layer_decay=layer_decay)
    groups = [{**group, "lr": learning_rate * group["lr_scale"]} for group in groups]
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def layer_decay_groups(model: LayeredModel, *, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Parameter groups whose learning rate falls with the distance from the head.

    lr_scale = layer_decay ** (depth + 1 - layer). The embeddings are layer 0 and block i, counted over all stages, is
    layer i + 1; what follows the blocks, last norm, feature pyramid and heads, has scale 1 (facebookresearch/mae,
    util/lr_decay.py, and microsoft/SimMIM, optimizer.py; timm's own rule counts the last norm to the last block). As
    there, vectors do not decay, nor what the model exempts.

    Args:
        weight_decay: of the parameters that do decay.
        layer_decay: in (0, 1]; with 1 all layers learn alike.

    Returns:
        Groups for an optimiser, largest scale first, so that what logs the first group's learning rate logs the
        peak's. Each has `params` as (name, parameter) pairs, `lr_scale` and `weight_decay`; frozen parameters are in
        none.

    Raises:
        ValueError: a layer decay that is not in (0, 1].
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay={layer_decay} must be above 0 and at most 1 (1: all layers learn alike)")
    layers, undecayed = model.base_model.modules_by_depth(), model.no_weight_decay()
    layer_of = {id(parameter): layer for layer, module in enumerate(layers) for parameter in module.parameters()}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = layer_decay ** (len(layers) - layer_of.get(id(parameter), len(layers)))
        decay = 0.0 if parameter.ndim <= 1 or name in undecayed else weight_decay
        group = groups.setdefault((scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append((name, parameter))
    return sorted(groups.values(), key=lambda group: -group["lr_scale"])


def schedule_as_lambda(optimizer: torch.optim.Optimizer, schedule: WarmupSchedule) -> LambdaLR:
    """The schedule as a factor on the learning rate that each group has now, for `transformers.Trainer`.

    Groups keep their ratio at every step, the final learning rate included, as in the official MAE
    (util/lr_sched.py).
    """
    return LambdaLR(optimizer, lambda step: schedule(step) / schedule.peak)


def parameter_names(model: OptimizedModel, optimizer: torch.optim.Optimizer) -> list[str]:
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
