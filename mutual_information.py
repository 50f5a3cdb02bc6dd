"""The information terms of MI-MAE (Eq. 7-10) as pure functions, and the approximator V of Sec. 5.4.

    code                              paper   minimised over   keeps or drops
    info_nce_loss                     Eq. 8   encoder          keeps what the views of an image share
    gaussian_negative_log_likelihood  Eq. 9   V alone          fits q(z|X), the model of what a view says of itself
    club_upper_bound                  Eq. 10  encoder alone    drops what is particular to one view

The weights are applied once, in the model. Everything here is computed in float32, also under autocast.

Shapes: B images of this process, N masks, V visible patches, D features of the latent; W processes.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# entries of the similarity of anchors and views that are computed at a time: 128 MiB of float32 a copy
MAX_SIMILARITIES = 2**25


def info_nce_loss(
    latent_vector: torch.Tensor, temperature: float, gathered: torch.Tensor | None = None, rank: int = 0
) -> torch.Tensor:
    """Eq. 7-8: each view is to find the other views of its image among all views of the global batch.

    For anchor i and another view k of its image the term is -s_ik / τ + log Σ_{c≠i} exp(s_ic / τ), with s the cosine
    similarity. The other positives stay in the denominator, as Eq. 7 has them, so that for N > 2 the loss does not
    approach 0. An image's N(N-1) ordered pairs are divided by N², as Eq. 8 has it.

    Only this process's anchors are computed; averaged over processes (as DDP averages gradients) the result is Eq. 8
    over the global batch.

    Memory: linear in the views, plus at most 512 MiB: four float32 copies of `MAX_SIMILARITIES` entries live at once.
    A larger similarity is computed some rows at a time, and again in the backward pass: none of it is kept between.

    Args:
        latent_vector: (B, N, D), the views of this process.
        temperature: τ.
        gathered: (W·B, N, D), the views of all processes in rank order; None where this process is the only one.
        rank: the position of this process's images in `gathered`.

    Returns:
        A scalar; 0 for N = 1.
    """
    num_images, num_views, _ = latent_vector.shape
    if num_views == 1:
        return latent_vector.new_zeros((), dtype=torch.float32)
    anchors = F.normalize(latent_vector.float(), dim=-1)  # (B, N, D)
    others = anchors if gathered is None else F.normalize(gathered.float(), dim=-1)  # (W·B, N, D)

    log_partition = _log_partition(anchors.flatten(0, 1), others.flatten(0, 1), temperature, rank)  # (B·N,)

    # Σ_{k≠i} s_ik = u_i · (Σ_k u_k - u_i): no need to pick the positives out of the matrix
    positives = (anchors * (anchors.sum(dim=1, keepdim=True) - anchors)).sum(dim=(1, 2)) / temperature  # (B,)
    per_image = (num_views - 1) * log_partition.view(num_images, num_views).sum(dim=1) - positives  # (B,)
    return per_image.mean() / num_views**2


def _log_partition(anchors: torch.Tensor, others: torch.Tensor, temperature: float, rank: int) -> torch.Tensor:
    """log Σ_{c≠i} exp(s_ic / τ) of the anchors i (M, D) over the views c (W·M, D) of all processes → (M,)."""
    self_ids = rank * len(anchors) + torch.arange(len(anchors), device=anchors.device)  # (M,), each anchor's column
    if len(anchors) * len(others) <= MAX_SIMILARITIES:
        return _log_partition_of_rows(anchors, self_ids, others, temperature)
    num_rows = max(1, MAX_SIMILARITIES // len(others))
    chunks = [
        checkpoint(_log_partition_of_rows, *rows, others, temperature, use_reentrant=False, preserve_rng_state=False)
        for rows in zip(anchors.split(num_rows), self_ids.split(num_rows), strict=True)
    ]
    return torch.cat(chunks)


def _log_partition_of_rows(
    anchors: torch.Tensor, self_ids: torch.Tensor, others: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The same for some of the anchors (m, D), given their columns (m,)."""
    with _without_autocast(anchors.device):
        similarity = anchors @ others.T / temperature  # (m, W·M)
    is_self = torch.arange(len(others), device=others.device) == self_ids[:, None]  # (m, W·M)
    return similarity.masked_fill(is_self, -torch.inf).logsumexp(dim=-1)


def gaussian_negative_log_likelihood(
    latent_vector: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """Eq. 9 and 33: -log q(z_j | X_j) = ½ [(z_j - μ_j)² / s_j + ln s_j + ln 2π], which fits V to the latent.

    The caller detaches `latent_vector`, so that the gradient reaches V alone.

    Args:
        latent_vector: (B, N, D).
        mean, variance: (B, N, D), or (B, N, V, D) for one Gaussian per visible token.
        reduction: over the features, "mean" or "sum"; always a mean over images, masks and tokens.
    """
    latent_vector = _align(latent_vector.float(), mean)
    nll = 0.5 * ((latent_vector - mean).square() / variance + variance.log() + math.log(2 * math.pi))
    return _reduce_features(nll, reduction).mean()


def club_upper_bound(
    latent_vector: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """Eq. 10 and 34, the CLUB bound on I(z; X): log q(z_j | X_j) - (1/N) Σ_k log q(z_k | X_j).

    k runs over the N masks of the same image, k = j included. ln s cancels, and with z̄ and Var the mean and variance
    of z over the masks the difference is [(μ - z̄)·(z_j - z̄) - ½((z_j - z̄)² - Var)] / s: linear in N, and without
    the cancellation of two large log-likelihoods. It is signed and not bounded below.

    The caller detaches `mean` and `variance`, so that the gradient reaches the encoder alone.

    Args:
        latent_vector: (B, N, D).
        mean, variance: (B, N, D), or (B, N, V, D) for one Gaussian per visible token.
        reduction: over the features, "mean" or "sum"; always a mean over images, masks and tokens.
    """
    latent_vector = latent_vector.float()
    center = latent_vector.mean(dim=1, keepdim=True)  # (B, 1, D)
    deviation = latent_vector - center  # (B, N, D)
    excess = deviation.square() - deviation.square().mean(dim=1, keepdim=True)  # (B, N, D)
    center, deviation, excess = (_align(x, mean) for x in (center, deviation, excess))
    bound = ((mean - center) * deviation - 0.5 * excess) / variance
    return _reduce_features(bound, reduction).mean()


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast would multiply matrices in bfloat16; the meta device knows no autocast."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _align(latent: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """(B, N, D) as it is, or (B, N, 1, D) against one Gaussian per token."""
    return latent if mean.ndim == latent.ndim else latent.unsqueeze(-2)


def _reduce_features(per_feature: torch.Tensor, reduction: str) -> torch.Tensor:
    return per_feature.sum(dim=-1) if reduction == "sum" else per_feature.mean(dim=-1)


class GaussianApproximator(nn.Module):
    """V of Sec. 5.4: the mean and the variance of q(z | X) = N(z; μ(X), s(X)), by two branches of their own.

    Each branch is Linear, GELU, Linear, Linear (the text puts no activation between the last two), then LeakyReLU
    for the mean and ReLU for the variance. ReLU can die, so `variance_eps` is added, and the bias of the variance's
    last layer starts at 1 (the model's initialisation does that).

    Args:
        in_features: width of X, the visible patch embeddings.
        out_features: D, width of the latent.
        hidden_features: H.
        variance_eps: the smallest variance.
    """

    def __init__(self, in_features: int, out_features: int, hidden_features: int, variance_eps: float):
        super().__init__()
        self.mean = self._branch(in_features, hidden_features, out_features, nn.LeakyReLU(), last_bias=0.0)
        self.variance = self._branch(in_features, hidden_features, out_features, nn.ReLU(), last_bias=1.0)
        self.variance_eps = variance_eps

    @staticmethod
    def _branch(
        in_features: int, hidden_features: int, out_features: int, activation: nn.Module, last_bias: float
    ) -> nn.Sequential:
        first = nn.Linear(in_features, hidden_features)
        second = nn.Linear(hidden_features, hidden_features)
        last = nn.Linear(hidden_features, out_features)
        for layer, bias in ((first, 0.0), (second, 0.0), (last, last_bias)):
            layer.initial_bias = bias  # type: ignore[assignment]  # read by the models' `_init_weights`
        return nn.Sequential(first, nn.GELU(), second, last, activation)

    def forward(self, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(…, in_features) → mean (…, D) and variance (…, D), float32 also under autocast."""
        with _without_autocast(visible.device):
            visible = visible.to(self.mean[0].weight.dtype)  # type: ignore[arg-type]  # of a Linear
            return self.mean(visible).float(), self.variance(visible).float() + self.variance_eps


class InformationGate(nn.Module):
    """Assumption 3: the information terms count only once reconstruction is good, L_rec < ε_l.

    A tensor that multiplies the terms: no branch on data, no host sync, a static graph, and one decision for all
    processes, as L_rec is averaged first. It lies in the checkpoint; only training moves it. NaN opens nothing.

    Args:
        threshold: ε_l; None = always open.
        mode: "latch" stays open once opened, "step" decides anew at each step.
        ramp_steps: forward passes of training in which an open gate rises from 0 to 1; 0 = it is 1 at once.
    """

    is_open: torch.Tensor
    steps_open: torch.Tensor

    def __init__(self, threshold: float | None, mode: str, ramp_steps: int = 0):
        super().__init__()
        self.threshold, self.mode, self.ramp_steps = threshold, mode, ramp_steps
        self.register_buffer("is_open", torch.zeros(()))
        if ramp_steps:  # counted in whole numbers: half a precision would stop at 256
            self.register_buffer("steps_open", torch.zeros((), dtype=torch.int64))

    def forward(self, reconstruction_loss: torch.Tensor) -> torch.Tensor:
        """This step's L_rec, a scalar → 0 (closed) to 1 (the terms count in full), a scalar without gradient."""
        if self.training and self.threshold is not None:
            below = (mean_over_processes(reconstruction_loss) < self.threshold).to(self.is_open.dtype)
            self.is_open.copy_(torch.maximum(self.is_open, below) if self.mode == "latch" else below)
        is_open = torch.ones_like(self.is_open) if self.threshold is None else self.is_open.clone()
        if self.training and self.ramp_steps:
            self.steps_open.add_(1).mul_(is_open.to(torch.int64))
        return is_open * (self.steps_open / self.ramp_steps).clamp(max=1) if self.ramp_steps else is_open


@dataclass
class InformationTerms:
    """Scalars; the three losses carry gradient, the three diagnostics do not."""

    mi_max_loss: torch.Tensor
    mi_min_loss: torch.Tensor
    approximation_loss: torch.Tensor
    latent_norm: torch.Tensor
    min_variance: torch.Tensor
    dead_variance_fraction: torch.Tensor


def information_terms(
    latent_vector: torch.Tensor,
    visible: torch.Tensor,
    approximator: GaussianApproximator | None,
    *,
    temperature: float | None,
    gather_negatives: bool,
    reduction: str,
) -> InformationTerms:
    """All information terms of one step, unweighted. One backward over their sum gives what Algorithm 1's three do.

        term                 encoder   V
        mi_max_loss          ∇         -
        mi_min_loss          ∇         -   (mean and variance detached)
        approximation_loss   -         ∇   (latent and V's input detached)

    Args:
        latent_vector: (B, N, D).
        visible: V's input, (B, N, D_in) pooled or (B, N, V, D_in) one per token; detached here, or the encoder could
            cheat through it.
        approximator: V; None leaves both of its terms at 0.
        temperature: τ; None leaves `mi_max_loss` at 0.
        gather_negatives: whether the other processes' views are negatives too.
        reduction: over the features, "mean" or "sum".
    """
    zero = latent_vector.new_zeros((), dtype=torch.float32)
    terms = InformationTerms(zero, zero, zero, latent_vector.detach().float().norm(dim=-1).mean(), zero, zero)
    if temperature is not None:
        gathered, rank = gather_views(latent_vector) if gather_negatives else (None, 0)
        terms.mi_max_loss = info_nce_loss(latent_vector, temperature, gathered, rank)
    if approximator is not None:
        mean, variance = approximator(visible.detach())
        terms.approximation_loss = gaussian_negative_log_likelihood(latent_vector.detach(), mean, variance, reduction)
        terms.mi_min_loss = club_upper_bound(latent_vector, mean.detach(), variance.detach(), reduction)
        terms.min_variance = variance.detach().amin()
        is_dead = variance.detach().flatten(0, -2).amax(dim=0) <= approximator.variance_eps  # (D,)
        terms.dead_variance_fraction = is_dead.float().mean()
    return terms


class _AllGather(torch.autograd.Function):
    """all_gather whose gradient is the sum of all processes' gradients for this process's slice.

    torch's plain all_gather carries no gradient, and one that returns only the local slice's own gradient shrinks
    the term by the number of processes: every view is also a negative of the other processes' anchors.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        ctx.num_local = tensor.shape[0]
        gathered = tensor.new_empty((dist.get_world_size() * tensor.shape[0], *tensor.shape[1:]))
        dist.all_gather_into_tensor(gathered, tensor.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.narrow(0, dist.get_rank() * ctx.num_local, ctx.num_local)


def gather_views(latent_vector: torch.Tensor) -> tuple[torch.Tensor | None, int]:
    """The views of all processes (W·B, N, D), differentiable, and this process's rank; (None, 0) if it is alone."""
    if not is_distributed():
        return None, 0
    return _AllGather.apply(latent_vector), dist.get_rank()


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """The mean of a scalar over all processes, without gradient, without a host sync."""
    value = value.detach().clone()
    if is_distributed():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


def is_distributed() -> bool:
    """Whether several processes share a step."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
