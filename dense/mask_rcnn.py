"""Mask R-CNN on the plain ViT, as ViTDet has it (Li et al. 2022, arXiv 2203.16527), of torchvision's parts.

Sizes and thresholds are those of detectron2 (configs/common/models/mask_rcnn_vitdet.py), and so is how layers are
initialised, except for the convolutions of the pyramid. Where torchvision's parts differ from detectron2's ("there"):

- Box regression, in the proposal network and in the box head, is smooth L1 with β = 1/9; there β = 0, which is L1.
- RoIAlign does not shift boxes by half a cell of the map (`aligned=False`); there it does. The same holds for the
  crops of the true masks, which are regressed as they are, in 0 … 1; there they are first rounded to 0 or 1.
- The losses of the proposal network are divided by the number of sampled anchors; there by 256 per image, which is
  the same as long as there are that many.
- In training, proposals are clipped to the padded square, and not to the picture in it.
- The corners of the anchors are rounded to whole pixels.
- The box of a proposal is predicted for the background, too, which no loss sees; so is its mask.

B images of C channels and S x S pixels, n objects of an image, K classes; D width of the encoder, F channels of maps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput

from ..configuration_mimae import MIMAEConfig
from ..families.family import FAMILIES
from ..families.registry import family_named
from .feature_pyramid import LEVEL_NAMES, ChannelNorm, SimpleFeaturePyramid
from .model import DenseModelMixin

# of a level of the pyramid, relative to the patches
LEVEL_STRIDES = (1 / 4, 1 / 2, 1, 2, 4)

# ViTDet-B for COCO; window attention in all but every third block
VITDET_BASE: dict[str, Any] = {
    "image_size": 1024,
    "window_size": 14,
    "use_relative_position_embeddings": True,
    "drop_path_rate": 0.1,
}


def backbone_classes() -> dict[type, type[PreTrainedModel]]:
    """The encoders that a detector can stand on, by the class of their configuration."""
    return {family.config_class: family.backbone_class for family in FAMILIES.values() if family.backbone_class}


@strict
class MaskRCNNConfig(PreTrainedConfig):
    """Configuration of `MaskRCNNForInstanceSegmentation`; defaults are ViTDet-B's for COCO, except for its 80 classes.

    `id2label` names the K classes of objects, without the background.

    Args:
        backbone_config: of the encoder, or its fields; None = ViTDet-B's. Images have its `image_size`, or any other
            that 4 patches divide.
        pyramid_channels: F, of all maps.
        box_conv_channels, box_fc_channels, mask_conv_channels: widths of the heads' layers.
        anchor_scale: side of an anchor, as a multiple of its level's stride; 8 gives 32 … 512 pixels at patches of 16.
        anchor_aspect_ratios: height / width.
        rpn_batch_size_per_image, box_batch_size_per_image: anchors and proposals drawn for the losses.
        rpn_nms_threshold, box_nms_threshold: IoU from which on the less likely of two boxes is dropped.
        rpn_pre_nms_top_n, rpn_post_nms_top_n: proposals kept of a level, and of an image: (training, evaluation).
        box_score_threshold: lowest score of a detection.
        detections_per_image: the most that are kept.

    Raises:
        StrictDataclassError (of huggingface_hub): a wrong type, or values that make no sense; the message names the
            field and what would be right.
    """

    model_type = "mimae_mask_rcnn"
    sub_configs: ClassVar[dict[str, type]] = {"backbone_config": AutoConfig}

    if TYPE_CHECKING:  # `__post_init__` and `validate_backbone_config` see to it
        backbone_config: Any = None
        num_labels: int = 2
    else:
        backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    pyramid_channels: int = 256
    box_conv_channels: list[int] | tuple[int, ...] = (256, 256, 256, 256)
    box_fc_channels: list[int] | tuple[int, ...] = (1024,)
    mask_conv_channels: list[int] | tuple[int, ...] = (256, 256, 256, 256)
    anchor_scale: float | int = 8
    anchor_aspect_ratios: list[float | int] | tuple[float | int, ...] = (0.5, 1.0, 2.0)
    rpn_batch_size_per_image: int = 256
    rpn_nms_threshold: float = 0.7
    rpn_pre_nms_top_n: list[int] | tuple[int, int] = (2000, 1000)
    rpn_post_nms_top_n: list[int] | tuple[int, int] = (1000, 1000)
    box_batch_size_per_image: int = 512
    box_score_threshold: float = 0.05
    box_nms_threshold: float = 0.5
    detections_per_image: int = 100

    def __post_init__(self, **kwargs: Any) -> None:
        if self.backbone_config is None:
            self.backbone_config = MIMAEConfig.preset("vit-base", **VITDET_BASE)
        elif isinstance(self.backbone_config, dict):
            family = family_named(self.backbone_config.get("model_type"))
            self.backbone_config = family.config_class.from_dict(self.backbone_config)
        super().__post_init__(**kwargs)

    @property
    def image_size(self) -> int | Sequence[int]:
        """Side in pixels, or (height, width): the encoder's."""
        return self.backbone_config.image_size

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the five levels, in pixels."""
        return tuple(int(self.backbone_config.patch_size * stride) for stride in LEVEL_STRIDES)

    def validate_backbone_config(self) -> None:
        """Part of `@strict`'s validation: the encoder suits a pyramid."""
        if type(self.backbone_config) not in backbone_classes():
            names = " or ".join(each.__name__ for each in backbone_classes())
            raise ValueError(f"backbone_config is a {type(self.backbone_config).__name__}: a {names} is needed")
        patch_size = self.backbone_config.patch_size
        if patch_size < 4 or patch_size.bit_count() > 1:
            raise ValueError(
                f"patch_size={patch_size} must be a power of 2, 4 at least: the finest level has 1/4 of it"
            )
        if self.backbone_config.add_fpn or len(self.backbone_config.out_indices) != 1:
            raise ValueError(
                f"out_indices={self.backbone_config.out_indices} with add_fpn={self.backbone_config.add_fpn}: the "
                "pyramid is made of one map alone, that of the last block"
            )


@dataclass
class MaskRCNNOutput(ModelOutput):
    """Losses in training mode, scalars, `loss` being their sum; detections in evaluation mode.

    detections: for each image `boxes` (n, 4), XYXY in pixels of the input, `scores` (n,), falling, `labels` (n,) in
        0 … K-1, and `masks` (n, 1, 28, 28), probabilities within the box.
    """

    loss: torch.FloatTensor | None = None
    rpn_objectness_loss: torch.FloatTensor | None = None
    rpn_box_loss: torch.FloatTensor | None = None
    box_class_loss: torch.FloatTensor | None = None
    box_regression_loss: torch.FloatTensor | None = None
    mask_loss: torch.FloatTensor | None = None
    detections: list[dict[str, torch.Tensor]] | None = None


# torchvision's name of a loss → ours
_LOSS_NAMES = {
    "loss_objectness": "rpn_objectness_loss",
    "loss_rpn_box_reg": "rpn_box_loss",
    "loss_classifier": "box_class_loss",
    "loss_box_reg": "box_regression_loss",
    "loss_mask": "mask_loss",
}


class InFloat32(nn.Module):
    """Predictions in float32, also under autocast.

    torchvision computes boxes in the type of what it decodes, and bfloat16 knows whole pixels only up to 256.
    """

    def forward(self, x: Any) -> Any:
        return _float32(super().forward(x))


class ProposalHead(InFloat32, RPNHead):
    """Maps (B, F, ·, ·) → logits (B, A, ·, ·) and boxes (B, 4A, ·, ·) of the A anchors of a place."""


class BoxPredictor(InFloat32, FastRCNNPredictor):
    """(proposals, channels) → logits (proposals, 1+K) and boxes (proposals, 4·(1+K)), the background first."""


class MaskPredictor(InFloat32, MaskRCNNPredictor):
    """(proposals, channels, 14, 14) → logits (proposals, 1+K, 28, 28)."""


class RoIAlign(MultiScaleRoIAlign):
    """Crops from the level that suits a box (FPN, arXiv 1612.03144, Eq. 1), at its true stride.

    torchvision infers strides from the largest image of the first batch that it sees, which may be much smaller than
    the padded ones that the maps are of. `side` is that of a crop, `stride` that of the finest map.
    """

    def __init__(self, side: int, stride: int):
        # as many samples in a cell of the crop as it covers places of the map: detectron2's choice
        super().__init__(featmap_names=list(LEVEL_NAMES), output_size=side, sampling_ratio=0)
        self.stride = stride

    def forward(
        self, x: Mapping[str, torch.Tensor], boxes: list[torch.Tensor], image_shapes: list[tuple[int, int]]
    ) -> torch.Tensor:
        """Boxes in pixels, XYXY → (boxes of all images, F, side, side); the sizes of the images do not count."""
        height, width = x[LEVEL_NAMES[0]].shape[-2:]
        return super().forward(x, boxes, [(height * self.stride, width * self.stride)])


class MaskRCNNForInstanceSegmentation(DenseModelMixin, PreTrainedModel):
    """Boxes, classes and masks of the objects in an image; its encoder is `backbone`, for layer decay."""

    config: MaskRCNNConfig
    config_class = MaskRCNNConfig
    main_input_name = "pixel_values"
    input_modalities: Any = ("image",)

    def __init__(self, config: MaskRCNNConfig):
        super().__init__(config)
        self.backbone: Any = backbone_classes()[type(config.backbone_config)](config.backbone_config)
        self.pyramid = SimpleFeaturePyramid(config.backbone_config.hidden_size, config.pyramid_channels)
        self.rpn = _proposal_network(config)
        self.roi_heads = _region_heads(config)
        self.post_init()

    def post_init(self) -> None:
        """Marks the layers that start from a normal distribution, as in detectron2, before all are initialised."""
        heads = self.roi_heads
        for layer in self.rpn.head.modules():
            layer.initial_std = 0.01
        heads.box_predictor.cls_score.initial_std = 0.01
        heads.box_predictor.bbox_pred.initial_std = 0.001
        heads.mask_predictor.mask_fcn_logits.initial_std = 0.001
        super().post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: Sequence[Mapping[str, torch.Tensor]] | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> MaskRCNNOutput:
        """Losses in training mode, detections in evaluation mode.

        Args:
            pixel_values: (B, C, S, S), normalised, resized and padded at the right and at the bottom.
            labels: for each image `boxes` (n, 4), XYXY in pixels, `labels` (n,), 0 … K-1, and `masks` (n, S, S), 0 or
                1; n may be 0. Needed in training, ignored in evaluation.
            image_sizes: (height, width) of each image without its padding, where nothing is detected; None = there is
                no padding.

        Raises:
            ValueError: 4 patches do not divide the images; no labels in training, or such as `check_labels` refuses.
        """
        size = (pixel_values.shape[2], pixel_values.shape[3])
        if any(side % self.config.strides[-1] for side in size):
            raise ValueError(
                f"images of {size[0]} x {size[1]} pixels: pad them to multiples of {self.config.strides[-1]}, the "
                "stride of the coarsest map"
            )
        sizes = [(int(height), int(width)) for height, width in image_sizes or [size] * len(pixel_values)]
        targets = None
        if self.training:
            check_labels(labels, len(pixel_values), size, self.config.num_labels)
            targets = [_as_target(each) for each in labels or ()]

        (feature_map,) = self.backbone(pixel_values).feature_maps  # (B, D, h, w)
        # torchvision makes its anchors in the type of the maps
        maps = {name: each.float() for name, each in self.pyramid(feature_map).items()}
        proposals, rpn_losses = self.rpn(ImageList(pixel_values, sizes), maps, targets)
        detections, roi_losses = self.roi_heads(maps, proposals, sizes, targets)

        if not self.training:
            return MaskRCNNOutput(detections=[{**each, "labels": each["labels"] - 1} for each in detections])
        losses = {_LOSS_NAMES[name]: loss for name, loss in (rpn_losses | roi_losses).items()}
        return MaskRCNNOutput(loss=sum(losses.values()), **losses)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """All but the encoder, which initialises itself; also where a checkpoint lacks a layer or has another size."""
        if isinstance(module, LayerNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            if std := getattr(module, "initial_std", None):
                init.normal_(module.weight, std=std)
            elif isinstance(module, nn.Linear):
                init.kaiming_uniform_(module.weight, a=1)
            else:
                init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)


def build_mask_rcnn(
    backbone: PreTrainedModel, *, id2label: Mapping[int, str], **fields: Any
) -> MaskRCNNForInstanceSegmentation:
    """A new Mask R-CNN on an encoder, which becomes a part of it; `fields` are of `MaskRCNNConfig`, as are errors.

    Args:
        backbone: with one feature map, that of the last block.
        id2label: names of the K classes, from 0 on.
    """
    label2id = {name: label for label, name in id2label.items()}
    attention = backbone.config._attn_implementation
    config = MaskRCNNConfig(backbone_config=backbone.config, id2label=dict(id2label), label2id=label2id, **fields)
    model = MaskRCNNForInstanceSegmentation(config)
    model.backbone = backbone
    backbone.config._attn_implementation = attention  # which the outer model has set to its own
    return model


def check_labels(
    labels: Sequence[Mapping[str, torch.Tensor]] | None, num_images: int, size: tuple[int, int], num_labels: int
) -> None:
    """Raises a ValueError for labels, as `forward` takes them, that would give no finite loss; `num_labels` is K."""
    if labels is None or len(labels) != num_images:
        raise ValueError(f"{0 if labels is None else len(labels)} labels for {num_images} images: training needs all")
    for index, each in enumerate(labels):
        boxes, classes, masks = each["boxes"], each["labels"], each["masks"]
        count = len(boxes)
        if len(classes) != count or masks.shape != (count, *size):
            raise ValueError(
                f"image {index} of the batch: {count} boxes, but {len(classes)} labels and masks of shape "
                f"{tuple(masks.shape)} for an image of {size[0]} x {size[1]} pixels"
            )
        if not count:
            continue
        if not (boxes.isfinite().all() and (boxes[:, 2:] > boxes[:, :2]).all()):
            raise ValueError(f"image {index} of the batch: a box without area, or with a side that is not finite")
        if classes.min() < 0 or classes.max() >= num_labels:
            raise ValueError(
                f"image {index} of the batch: a label outside 0 … {num_labels - 1}: id2label is of other classes"
            )


def _float32(outputs: Any) -> Any:
    """Converts a tensor, or a list or tuple of such, however deep."""
    return outputs.float() if isinstance(outputs, torch.Tensor) else type(outputs)(map(_float32, outputs))


def _as_target(label: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As torchvision expects it: plain tensors, the background is class 0."""
    plain = {name: label[name].as_subclass(torch.Tensor) for name in ("boxes", "labels", "masks")}
    return {**plain, "boxes": plain["boxes"].float(), "labels": plain["labels"] + 1}


def _proposal_network(config: MaskRCNNConfig) -> RegionProposalNetwork:
    ratios = tuple(config.anchor_aspect_ratios)
    sizes = tuple((config.anchor_scale * stride,) for stride in config.strides)
    before, after = (
        dict(zip(("training", "testing"), numbers, strict=True))
        for numbers in (config.rpn_pre_nms_top_n, config.rpn_post_nms_top_n)
    )
    return RegionProposalNetwork(
        anchor_generator=AnchorGenerator(sizes, (ratios,) * len(sizes)),
        head=ProposalHead(config.pyramid_channels, num_anchors=len(ratios), conv_depth=2),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=config.rpn_batch_size_per_image,
        positive_fraction=0.5,
        pre_nms_top_n=before,
        post_nms_top_n=after,
        nms_thresh=config.rpn_nms_threshold,
    )


def _region_heads(config: MaskRCNNConfig) -> RoIHeads:
    channels, stride, num_classes = config.pyramid_channels, config.strides[0], 1 + config.num_labels
    box_convs, box_fcs, mask_convs = config.box_conv_channels, config.box_fc_channels, config.mask_conv_channels
    return RoIHeads(
        box_roi_pool=RoIAlign(side=7, stride=stride),
        box_head=FastRCNNConvFCHead((channels, 7, 7), list(box_convs), list(box_fcs), norm_layer=ChannelNorm),
        box_predictor=BoxPredictor(box_fcs[-1], num_classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=config.box_batch_size_per_image,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=config.box_score_threshold,
        nms_thresh=config.box_nms_threshold,
        detections_per_img=config.detections_per_image,
        mask_roi_pool=RoIAlign(side=14, stride=stride),
        mask_head=MaskRCNNHeads(channels, list(mask_convs), dilation=1, norm_layer=ChannelNorm),
        mask_predictor=MaskPredictor(mask_convs[-1], mask_convs[-1], num_classes),
    )
