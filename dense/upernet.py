"""UperNet (Xiao et al. 2018, arXiv 1807.10221) on the ViT, for semantic segmentation: transformers' own, assembled.

B images of C channels and H x W pixels, K classes.
"""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel, UperNetConfig, UperNetForSemanticSegmentation
from transformers.modeling_outputs import SemanticSegmenterOutput

from .model import DenseModelMixin


class UperNet(DenseModelMixin, UperNetForSemanticSegmentation):
    """transformers' UperNet, whose loss is 0 instead of NaN where no pixel of a batch has a class.

    Its files are those of a `UperNetForSemanticSegmentation`. On several GPUs
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes the batch statistics those of all of them.
    """

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> SemanticSegmenterOutput:
        """Logits (B, K, H, W), and the loss where there are labels.

        Args:
            pixel_values: (B, C, H, W), normalised.
            labels: (B, H, W), int64, 0 … K-1 or `loss_ignore_index`.

        Raises:
            ValueError: a single image in training; see also the encoder's `forward`.
        """
        if self.training and len(pixel_values) < 2:
            raise ValueError(
                "UperNet normalises over the batch, and its coarsest map has one place for each image: it trains on 2 "
                "images per process or more; raise --per_device_train_batch_size"
            )
        features = self.backbone(pixel_values).feature_maps
        logits = self._upsample(self.decode_head(features), pixel_values)
        if labels is None:
            return SemanticSegmenterOutput(logits=logits)
        loss = mean_cross_entropy(logits, labels, self.config.loss_ignore_index)
        if self.auxiliary_head is not None:
            auxiliary_logits = self._upsample(self.auxiliary_head(features), pixel_values)
            auxiliary_loss = mean_cross_entropy(auxiliary_logits, labels, self.config.loss_ignore_index)
            loss = loss + self.config.auxiliary_loss_weight * auxiliary_loss
        return SemanticSegmenterOutput(loss=loss, logits=logits)

    def _upsample(self, logits: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(logits, size=pixel_values.shape[-2:], mode="bilinear")  # (B, K, H, W)


def mean_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignored: int) -> torch.Tensor:
    """Mean over the pixels that have a class, 0 if none has one; logits (B, K, H, W), labels (B, H, W), int64."""
    total = nn.functional.cross_entropy(logits, labels, ignore_index=ignored, reduction="sum")
    return total / (labels != ignored).sum().clamp_min(1)


def build_upernet(
    backbone: PreTrainedModel,
    *,
    id2label: Mapping[int, str],
    channels: int = 768,
    auxiliary_channels: int = 256,
    auxiliary_loss_weight: float = 0.4,
    pool_scales: tuple[int, ...] = (1, 2, 3, 6),
) -> UperNet:
    """A new UperNet on an encoder, which becomes a part of it; defaults are MAE's for ADE20K with a ViT-B.

    Args:
        backbone: with four feature maps (`add_fpn`).
        id2label: names of the K classes, from 0 on; at least two.
        channels, auxiliary_channels: widths of the two heads.
        auxiliary_loss_weight: of the second, which sees the third map alone.
        pool_scales: sides of the pooled maps of the pyramid pooling module.

    Raises:
        ValueError: the encoder gives other maps, or there is only one class.
    """
    if not backbone.config.add_fpn:
        raise ValueError("UperNet needs maps of four sizes: set add_fpn=True in the encoder's configuration")
    if len(id2label) < 2:
        raise ValueError(f"{len(id2label)} class: segmentation needs two at least")
    attention = backbone.config._attn_implementation
    config = UperNetConfig(
        backbone_config=backbone.config,
        id2label=dict(id2label),
        label2id={name: label for label, name in id2label.items()},
        hidden_size=channels,
        auxiliary_in_channels=backbone.config.hidden_size,
        auxiliary_channels=auxiliary_channels,
        auxiliary_loss_weight=auxiliary_loss_weight,
        pool_scales=pool_scales,
    )
    model = UperNet(config)
    model.backbone = backbone
    backbone.config._attn_implementation = attention  # which the outer model has set to its own
    return model
