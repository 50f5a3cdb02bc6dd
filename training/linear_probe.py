"""Linear probing: a frozen encoder, and linear classifiers on its features trained by LARS.

Several learning rates are tried in one pass over the images: each has a head of its own.

Shapes: B images, C channels, H × W pixels, D features, K heads, M classes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.optim import Lars
from torch import nn
from transformers import EvalPrediction
from transformers.modeling_outputs import ImageClassifierOutput

from ..evaluation.features import Encoder
from ..modeling_mim import classification_loss


class LinearProbe(nn.Module):
    """K linear classifiers side by side on the batch-normalised features of one frozen encoder.

    The official MAE's head (main_linprobe.py): BatchNorm without affine parameters, then a linear layer of weights
    N(0, 0.01) and biases 0. All heads start from the same weights, and none sees another's gradient: they differ by
    their learning rate and nothing else. In a run of several processes the statistics of a training batch are each
    process's own, as there.

    The state dict holds the heads and the running statistics; the encoder does not change and stays out of it.

    Args:
        encoder: its `pooler_output` (B, D) is what is classified; it is frozen here and stays in evaluation mode.
        feature_size: D.
        num_classes: M.
        learning_rates: the peak of each head's.

    Raises:
        ValueError: no learning rate, two equal ones, or one that is not positive.
    """

    def __init__(self, encoder: Encoder, *, feature_size: int, num_classes: int, learning_rates: Sequence[float]):
        super().__init__()
        if not learning_rates or min(learning_rates) <= 0 or len(set(learning_rates)) < len(learning_rates):
            raise ValueError(f"learning_rates={list(learning_rates)} must be one or more different positive numbers")
        self.learning_rates = tuple(learning_rates)
        self.encoder = encoder.requires_grad_(False).eval()
        self.norm = nn.BatchNorm1d(feature_size, affine=False, eps=1e-6)
        weight = torch.randn(num_classes, feature_size) * 0.01
        heads = [nn.Linear(feature_size, num_classes) for _ in learning_rates]
        self.heads = nn.ModuleList(heads)
        for head in heads:
            nn.init.zeros_(head.bias)
            with torch.no_grad():
                head.weight.copy_(weight)
        self.register_state_dict_post_hook(_leave_encoder_out)
        self.register_load_state_dict_post_hook(_do_not_miss_encoder)

    def train(self, mode: bool = True) -> "LinearProbe":
        """As in torch, but the encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """Classifies each image K times.

        Args:
            pixel_values: (B, C, H, W), normalised.
            labels: (B,), int64, -100 where there is none; or soft ones (B, M).

        Returns:
            `logits` (B, K, M), and with labels `loss`: the sum of the heads' cross-entropies, each a mean over the
            images that have a label (0 where none has).
        """
        features = self.norm(self.features(pixel_values))  # (B, D)
        logits = torch.stack([head(features) for head in self.heads], dim=1)  # (B, K, M)
        loss: Any = None if labels is None else sum(classification_loss(one, labels) for one in logits.unbind(dim=1))
        return ImageClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → (B, D), float32, before the normalisation."""
        return self.encoder.encode(pixel_values).pooler_output.float()

    def as_linear(self, index: int) -> nn.Linear:
        """One head and the running statistics as a single linear layer on features that are not normalised."""
        head: Any = self.heads[index]
        norm: Any = self.norm
        linear = nn.Linear(head.in_features, head.out_features, device=head.weight.device)
        with torch.no_grad():
            linear.weight.copy_(head.weight / (norm.running_var + norm.eps).sqrt())
            linear.bias.copy_(head.bias - linear.weight @ norm.running_mean)
        return linear


def build_probe_lars(probe: LinearProbe) -> Lars:
    """LARS as the official MAE has it (util/lars.py): momentum 0.9, trust coefficient 0.001, no weight decay.

    Each head's weight has a trust ratio of its own, the biases have none. timm's LARS has neither where nothing
    decays, unless a group asks for it; without its `eps` it is the official one to the last bit.
    """
    groups: list[dict[str, Any]] = []
    for head, learning_rate in zip(probe.heads, probe.learning_rates, strict=True):
        groups.append({"params": [head.weight], "lr": learning_rate, "always_adapt": True})
        groups.append({"params": [head.bias], "lr": learning_rate, "always_adapt": False})
    return Lars(groups, momentum=0.9, trust_coeff=0.001, weight_decay=0.0, eps=0.0)


def metrics_of_heads(
    learning_rates: Sequence[float], compute_metrics: Callable[[EvalPrediction], dict[str, float]]
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Metrics of every head, `accuracy_lr_6.4` and the like, and those of the best one by their plain names.

    The best is the most accurate, of equal ones the first. It is chosen on the images that it is reported on, as in
    the literature: hence the figures of all.

    Args:
        compute_metrics: of one head's `predictions` (n, 5) and `label_ids` (n,); one of them is "accuracy".

    Returns:
        A function of an `EvalPrediction` with `predictions` (n, K, 5); it adds `best_learning_rate`.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        ranked: Any = prediction.predictions
        heads = [
            compute_metrics(EvalPrediction(predictions=ranked[:, k], label_ids=prediction.label_ids))
            for k in range(len(learning_rates))
        ]
        best = max(range(len(heads)), key=lambda k: heads[k]["accuracy"])
        by_rate = {
            f"{name}_lr_{rate:g}": value
            for rate, metrics in zip(learning_rates, heads, strict=True)
            for name, value in metrics.items()
        }
        return {**heads[best], "best_learning_rate": learning_rates[best], **by_rate}

    return compute


def _leave_encoder_out(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}encoder.")]:
        del state[name]


def _do_not_miss_encoder(module: nn.Module, incompatible_keys: Any) -> None:
    missing = incompatible_keys.missing_keys
    missing[:] = [name for name in missing if not name.startswith("encoder.")]
