"""Mask R-CNN is torchvision's on a ViTDet backbone, whatever the batch holds.

K = 3 classes, images of 64 x 64 pixels, levels at strides of 2 to 32.
"""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from references import TINY
from torch import nn
from torchvision import tv_tensors
from torchvision.models.detection import MaskRCNN
from torchvision.ops import MultiScaleRoIAlign
from transformers import AutoConfig, AutoModel

from mimae import MIMAEBackbone, MIMAEConfig
from mimae.dense.mask_rcnn import MaskRCNNConfig, MaskRCNNForInstanceSegmentation, RoIAlign, build_mask_rcnn
from mimae.modeling_mimae import sincos_positions
from mimae.training.optimization import layer_decay_groups

ENCODER = {
    "image_size": 64,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "decoder_hidden_size": 16,
    "decoder_num_attention_heads": 2,
    "window_size": 3,
    "global_attention_indexes": [1],
    "use_relative_position_embeddings": True,
}
WIDTHS = {"pyramid_channels": 16, "box_conv_channels": [16], "box_fc_channels": [32], "mask_conv_channels": [16]}
CLASSES = {0: "circle", 1: "square", 2: "star"}
LOSSES = ("rpn_objectness_loss", "rpn_box_loss", "box_class_loss", "box_regression_loss", "mask_loss")


def build(**fields):
    """A new, small model that takes every box for a detection."""
    encoder = MIMAEBackbone(MIMAEConfig(**ENCODER))
    return build_mask_rcnn(encoder, id2label=CLASSES, **{**WIDTHS, "box_score_threshold": 0.0, **fields})


def objects(*boxes, size=64):
    """Labels with these (x1, y1, x2, y2, class), each mask the whole box."""
    masks = torch.zeros(len(boxes), size, size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2, _) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    corners = torch.tensor([box[:4] for box in boxes], dtype=torch.float32).reshape(-1, 4)
    return {
        "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(size, size)),
        "labels": torch.tensor([box[4] for box in boxes], dtype=torch.int64),
        "masks": tv_tensors.Mask(masks),
    }


def pictures(*labels, size=64):
    """Noise in which the objects stand out, each class in a channel of its own."""
    images = 0.1 * torch.randn(len(labels), 3, size, size)
    for image, label in zip(images, labels, strict=True):
        for mask, number in zip(label["masks"], label["labels"], strict=True):
            image[number] += 2 * mask
    return images


TWO = (objects((8, 8, 40, 32, 2), (30, 36, 60, 62, 0)), objects((20, 4, 52, 60, 1)))


class Maps(nn.Module):
    """Encoder and pyramid as torchvision's detectors want a backbone."""

    def __init__(self, model):
        super().__init__()
        self.model, self.out_channels = model, model.config.pyramid_channels

    def forward(self, images):
        return self.model.pyramid(*self.model.backbone(images).feature_maps)


def torchvisions(model):
    """torchvision's own MaskRCNN of the same layers; the strides of its crops are inferred by its own rule."""
    heads = model.roi_heads
    names = ["0", "1", "2", "3"]
    return MaskRCNN(
        Maps(model),
        min_size=64,
        max_size=64,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=model.rpn.anchor_generator,
        rpn_head=model.rpn.head,
        rpn_post_nms_top_n_train=1000,
        box_roi_pool=MultiScaleRoIAlign(names, 7, sampling_ratio=0),
        box_head=heads.box_head,
        box_predictor=heads.box_predictor,
        box_score_thresh=0.0,
        rpn_batch_size_per_image=model.config.rpn_batch_size_per_image,
        box_batch_size_per_image=model.config.box_batch_size_per_image,
        mask_roi_pool=MultiScaleRoIAlign(names, 14, sampling_ratio=0),
        mask_head=heads.mask_head,
        mask_predictor=heads.mask_predictor,
    )


def test_losses_are_those_of_torchvisions_mask_rcnn_with_the_background_as_class_0():
    # so many that all anchors and proposals count: which ones are drawn does not matter
    model = build(rpn_batch_size_per_image=20_000, box_batch_size_per_image=20_000).train()
    images = pictures(*TWO)
    targets = [{name: each[name].as_subclass(torch.Tensor) for name in each} for each in TWO]
    targets = [{**each, "labels": each["labels"] + 1} for each in targets]
    output = model(images, TWO)
    expected = torchvisions(model).train()(list(images), targets)
    names = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
    for ours, theirs in zip(LOSSES, names, strict=True):
        torch.testing.assert_close(output[ours], expected[theirs])
    torch.testing.assert_close(output.loss, sum(expected.values()))


def test_detections_are_those_of_torchvisions_mask_rcnn_but_for_the_labels_and_unpasted_masks():
    model = build().eval()
    images = pictures(*TWO)
    with torch.no_grad():
        found, expected = model(images).detections, torchvisions(model).eval()(list(images))
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours["boxes"]) == 100
        torch.testing.assert_close(ours["boxes"], theirs["boxes"])
        torch.testing.assert_close(ours["scores"], theirs["scores"])
        assert torch.equal(ours["labels"], theirs["labels"] - 1)
        assert set(ours["labels"].tolist()) <= {0, 1, 2}
        assert ours["masks"].shape == (100, 1, 28, 28)
        assert 0 <= ours["masks"].min() <= ours["masks"].max() <= 1


def test_the_losses_of_one_batch_fall_when_it_is_trained_on():
    model = build(box_batch_size_per_image=64, rpn_post_nms_top_n=[150, 150]).train()
    images = pictures(*TWO)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    outputs = []
    for _ in range(30):
        optimizer.zero_grad()
        outputs.append(model(images, TWO))
        outputs[-1].loss.backward()
        optimizer.step()
    first, last = outputs[0], outputs[-5:]
    for name, part in (("rpn_objectness_loss", 0.1), ("box_class_loss", 0.5), ("mask_loss", 0.5)):
        assert sum(each[name].item() for each in last) / 5 < part * first[name].item()


@pytest.mark.parametrize("labels", [(objects(), objects()), (TWO[0], objects())], ids=["none", "one"])
def test_images_without_an_object_give_finite_losses_and_every_parameter_a_gradient(labels):
    model = build().train()
    output = model(pictures(*labels), labels)
    output.loss.backward()
    assert all(output[name].isfinite() for name in LOSSES)
    if not any(len(each["boxes"]) for each in labels):
        assert output.rpn_box_loss == output.box_regression_loss == output.mask_loss == 0
    trained = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    assert [name for name, gradient in trained.items() if gradient is None] == []
    assert all(gradient.isfinite().all() for gradient in trained.values())


def test_every_part_learns_from_a_batch_with_objects():
    model = build().train()
    model(pictures(*TWO), TWO).loss.backward()
    still = {name for name, each in model.named_parameters() if each.requires_grad and not each.grad.any()}
    assert still == set()


def test_crops_follow_the_maps_and_not_the_images_without_their_padding():
    maps = {name: torch.randn(1, 4, 32 // 2**i, 32 // 2**i) for i, name in enumerate("0123")}
    boxes = [torch.tensor([[3.0, 4.0, 20.0, 22.0], [1.0, 1.0, 30.0, 18.0]])]
    expected = MultiScaleRoIAlign(list("0123"), 7, sampling_ratio=0)(maps, boxes, [(64, 64)])
    torch.testing.assert_close(RoIAlign(side=7, stride=2)(maps, boxes, [(24, 31)]), expected)


def test_nothing_is_detected_in_the_padding():
    model = build().eval()
    with torch.no_grad():
        (found,) = model(torch.randn(1, 3, 64, 64), image_sizes=[(24, 40)]).detections
    assert len(found["boxes"])
    assert found["boxes"].min() >= 0
    assert found["boxes"][:, [0, 2]].max() <= 40
    assert found["boxes"][:, [1, 3]].max() <= 24


def test_under_autocast_boxes_stay_in_float32():
    model = build().train()
    images = pictures(*TWO)
    torch.manual_seed(1)
    expected = model(images, TWO)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, TWO)
        output.loss.backward()
        boxes = model.eval()(images).detections[0]["boxes"]
    for name in LOSSES:
        torch.testing.assert_close(output[name], expected[name], rtol=0.05, atol=0.01)
    assert boxes.dtype == torch.float32
    assert not torch.equal(boxes, boxes.bfloat16().float())


def test_gradient_checkpointing_changes_no_gradient():
    model = build().train()
    images, gradients = pictures(*TWO), []
    for _ in range(2):
        torch.manual_seed(1)
        model.zero_grad()
        model(images, TWO).loss.backward()
        gradients.append([each.grad.clone() for each in model.parameters() if each.requires_grad])
        model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.backbone.layers)
    torch.testing.assert_close(*gradients)


def test_a_saved_model_is_found_by_its_type_and_detects_the_same(tmp_path):
    model = build().eval()
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is MaskRCNNForInstanceSegmentation
    assert again.config.id2label == CLASSES
    fields = model.config.backbone_config.to_diff_dict()
    assert again.config.backbone_config.to_diff_dict() == {**fields, "dtype": "float32"}
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(again(images).detections, model(images).detections, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_checkpoint_of_other_classes_gets_new_predictors_and_keeps_the_rest(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    names = {0: "cat", 1: "dog", 2: "emu", 3: "fox", 4: "gnu"}
    again = MaskRCNNForInstanceSegmentation.from_pretrained(
        tmp_path, id2label=names, label2id={name: i for i, name in names.items()}, ignore_mismatched_sizes=True
    )
    predictor = again.roi_heads.box_predictor
    assert predictor.cls_score.out_features == 6
    assert predictor.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.25)
    assert predictor.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.25)
    assert not predictor.cls_score.bias.any()
    kept = {name: each for name, each in again.state_dict().items() if "predictor" not in name}
    torch.testing.assert_close(kept, {name: model.state_dict()[name] for name in kept}, rtol=0, atol=0)


def test_a_new_model_keeps_the_encoders_own_initialisation_and_gives_the_heads_detectron2s():
    model = MaskRCNNForInstanceSegmentation(MaskRCNNConfig(backbone_config=MIMAEConfig(**ENCODER)))
    encoder, heads = model.backbone, model.roi_heads
    torch.testing.assert_close(encoder.embeddings.position_embeddings.detach(), sincos_positions((8, 8), 32))
    bound = (6 / (32 + 64)) ** 0.5  # xavier-uniform
    assert 0.95 * bound < encoder.layers[0].mlp.fc1.weight.abs().max() <= bound
    assert not encoder.layers[0].attention.relative_positions.height.any()
    deviations = {
        model.rpn.head.conv[0][0]: 0.01,
        model.rpn.head.bbox_pred: 0.01,
        heads.box_head[0][0]: (2 / (256 * 9)) ** 0.5,
        heads.box_head[5]: (1 / (256 * 49)) ** 0.5,
        heads.mask_head[3][0]: (2 / (256 * 9)) ** 0.5,
        heads.mask_predictor.mask_fcn_logits: 0.001,
    }
    for layer, deviation in deviations.items():
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.1)
        assert layer.bias is None or not layer.bias.any()


def test_the_default_is_vitdet_b():
    config = MaskRCNNConfig(num_labels=80)
    assert config.image_size == 1024
    assert config.strides == (4, 8, 16, 32, 64)
    with torch.device("meta"):
        model = MaskRCNNForInstanceSegmentation(config)
    assert [sizes for (sizes,) in model.rpn.anchor_generator.sizes] == [32, 64, 128, 256, 512]
    windows = [layer.attention.window_size for layer in model.backbone.layers]
    assert [i for i, side in enumerate(windows) if side is None] == [2, 5, 8, 11]
    assert {side for side in windows if side is not None} == {14}


def test_layer_decay_reaches_the_encoder_and_leaves_the_rest_at_full_rate():
    model = build()
    groups = layer_decay_groups(model, weight_decay=0.1, layer_decay=0.7)
    scale, decay = {}, {}
    for group in groups:
        for name, _ in group["params"]:
            scale[name], decay[name] = group["lr_scale"], group["weight_decay"]
    assert scale["backbone.embeddings.patch_embeddings.projection.weight"] == pytest.approx(0.7**3)
    assert scale["backbone.layers.1.mlp.fc1.weight"] == pytest.approx(0.7)
    assert scale["pyramid.levels.0.0.weight"] == scale["roi_heads.box_predictor.cls_score.weight"] == 1
    assert decay["backbone.embeddings.position_embeddings"] == 0
    assert decay["pyramid.levels.0.0.weight"] == 0.1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"boxes": torch.tensor([[8.0, 8.0, 8.0, 32.0]])}, "without area"),
        ({"boxes": torch.tensor([[8.0, 8.0, float("nan"), 32.0]])}, "not finite"),
        ({"labels": torch.tensor([3])}, "outside 0 … 2"),
        ({"labels": torch.tensor([-1])}, "outside 0 … 2"),
        ({"labels": torch.tensor([0, 1])}, "1 boxes, but 2 labels"),
        ({"masks": torch.zeros(1, 32, 64, dtype=torch.uint8)}, r"\(1, 32, 64\)"),
    ],
)
def test_labels_that_no_loss_can_be_computed_of_are_refused(change, reason):
    model = build().train()
    with pytest.raises(ValueError, match=reason):
        model(torch.randn(2, 3, 64, 64), [TWO[1], {**TWO[1], **change}])


def test_training_without_labels_is_refused():
    with pytest.raises(ValueError, match="0 labels for 2 images"):
        build().train()(torch.randn(2, 3, 64, 64))


def test_images_that_the_coarsest_map_does_not_divide_are_refused():
    with pytest.raises(ValueError, match="64 x 80 pixels: pad them to multiples of 32"):
        build().eval()(torch.randn(1, 3, 64, 80))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"patch_size": 6, "image_size": 96}, "power of 2"), ({"out_indices": [1, 2]}, "one map alone")],
)
def test_an_encoder_that_no_pyramid_can_stand_on_is_refused(fields, reason):
    with pytest.raises(StrictDataclassError, match=reason):
        build_mask_rcnn(MIMAEBackbone(MIMAEConfig(**{**ENCODER, **fields})), id2label=CLASSES)


def test_the_type_is_known_to_transformers():
    assert isinstance(AutoConfig.for_model("mimae_mask_rcnn", **WIDTHS), MaskRCNNConfig)


def test_a_built_model_keeps_the_encoders_attention_implementation():
    backbone = MIMAEBackbone(MIMAEConfig(**TINY, attn_implementation="eager"))
    assert build_mask_rcnn(backbone, id2label={0: "a"}).backbone.config._attn_implementation == "eager"
