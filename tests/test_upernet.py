"""UperNet is transformers' own on MI-MAE's backbone, but for a batch in which no pixel has a class.

K = 3 classes, images of 32 x 32 pixels, maps of 16 to 2 places a side.
"""

import pytest
import torch
from references import TINY
from torch import nn
from transformers import UperNetForSemanticSegmentation

from mimae import MIMAEBackbone, MIMAEConfig
from mimae.dense.upernet import UperNet, build_upernet
from mimae.training.optimization import layer_decay_groups

ENCODER = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "decoder_hidden_size": 16,
    "decoder_num_attention_heads": 2,
    "add_fpn": True,
    "out_indices": [1, 2, 3, 4],
    "use_relative_position_bias": True,
}
CLASSES = {0: "sky", 1: "sea", 2: "sand"}


def build(**fields):
    return build_upernet(
        MIMAEBackbone(MIMAEConfig(**ENCODER)), id2label=CLASSES, channels=16, auxiliary_channels=8, **fields
    )


def batch(size=2):
    """Images, and labels of which a quarter is ignored."""
    labels = torch.randint(0, 3, (size, 32, 32))
    labels[:, :16, :16] = 255
    return torch.randn(size, 3, 32, 32), labels


def stock(model, folder):
    """As transformers loads it."""
    model.save_pretrained(folder)
    loaded, info = UperNetForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded


def test_a_saved_model_is_stock_upernet_with_the_same_logits_loss_and_gradients(tmp_path):
    model = build()
    reference = stock(model, tmp_path)
    assert type(reference) is UperNetForSemanticSegmentation
    images, labels = batch()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images).logits, reference.eval()(images).logits)
    losses = [each.train()(images, labels=labels).loss for each in (model, reference)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    expected = {name: each.grad for name, each in reference.named_parameters() if each.grad is not None}
    torch.testing.assert_close({name: model.get_parameter(name).grad for name in expected}, expected)


def test_the_encoder_that_is_given_becomes_a_part_of_it():
    encoder = MIMAEBackbone(MIMAEConfig(**ENCODER))
    model = build_upernet(encoder, id2label=CLASSES, channels=16)
    assert model.backbone is model.base_model is encoder
    assert model.config.num_labels == 3
    assert model.config.label2id == {"sky": 0, "sea": 1, "sand": 2}
    assert model.decode_head.channels == 16
    assert model.auxiliary_head.convs[0].conv.in_channels == 32


def test_defaults_are_maes_for_ade20k():
    with torch.device("meta"):
        model = build_upernet(MIMAEBackbone(MIMAEConfig(add_fpn=True)), id2label=dict.fromkeys(range(150), ""))
    assert model.config.hidden_size == 768
    assert model.config.auxiliary_channels == 256
    assert model.config.auxiliary_loss_weight == 0.4
    assert model.auxiliary_head.convs[0].conv.in_channels == 768
    assert list(model.config.backbone_config.out_indices) == [4, 6, 8, 12]


def test_a_batch_without_a_single_class_gives_a_loss_and_gradients_of_exactly_0():
    model = build().train()
    images, labels = batch()
    loss = model(images, torch.full_like(labels, 255)).loss
    loss.backward()
    assert loss == 0
    trained = [each.grad for each in model.parameters() if each.requires_grad]
    assert not any(gradient.any() for gradient in trained)  # NaN would be any


def test_every_parameter_gets_a_gradient():
    model = build().train()
    model(*batch()).loss.backward()
    assert [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None] == []


def test_one_image_alone_is_refused_in_training_and_taken_in_evaluation():
    model = build()
    images, labels = batch(size=1)
    with pytest.raises(ValueError, match="--per_device_train_batch_size"):
        model.train()(images, labels)
    assert model.eval()(images, labels).loss.isfinite()


@pytest.mark.parametrize("size", [(64, 32), (40, 48)])
def test_images_of_other_sizes_are_segmented_at_their_own(size):
    with torch.no_grad():
        assert build().eval()(torch.randn(1, 3, *size)).logits.shape == (1, 3, *size)


def test_batch_norms_can_be_synchronised_and_keep_their_names():
    model = build()
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(build())
    assert synchronised.state_dict().keys() == model.state_dict().keys()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in synchronised.modules())
    assert isinstance(synchronised.decode_head.psp_modules.blocks[0].layers[1].batch_norm, nn.SyncBatchNorm)


def test_gradient_checkpointing_changes_no_gradient():
    model = build().train()
    images, labels = batch()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(images, labels).loss.backward()
        gradients.append([each.grad.clone() for each in model.parameters() if each.grad is not None])
        model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.backbone.layers)
    torch.testing.assert_close(*gradients)


def test_layer_decay_reaches_the_encoder_and_leaves_the_heads_at_full_rate():
    groups = layer_decay_groups(build(), weight_decay=0.05, layer_decay=0.65)
    found = {name: group for group in groups for name, _ in group["params"]}
    assert found["backbone.layers.0.mlp.fc1.weight"]["lr_scale"] == pytest.approx(0.65**4)
    assert found["backbone.fpn.0.0.weight"]["lr_scale"] == found["decode_head.classifier.weight"]["lr_scale"] == 1
    assert found["backbone.embeddings.position_embeddings"]["weight_decay"] == 0
    assert found["decode_head.classifier.weight"]["weight_decay"] == 0.05


def test_under_autocast_the_loss_is_float32_and_near_its_value():
    model = build().train()
    images, labels = batch()
    expected = model(images, labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, labels).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.01)


def test_an_encoder_of_one_map_and_a_single_class_are_refused():
    encoder = MIMAEBackbone(MIMAEConfig(**{**ENCODER, "add_fpn": False}))
    with pytest.raises(ValueError, match="add_fpn=True"):
        build_upernet(encoder, id2label=CLASSES)
    with pytest.raises(ValueError, match="1 class"):
        build_upernet(MIMAEBackbone(MIMAEConfig(**ENCODER)), id2label={0: "sky"})


def test_it_is_a_segmenter_of_transformers():
    assert issubclass(UperNet, UperNetForSemanticSegmentation)


def test_a_built_model_keeps_the_encoders_attention_implementation():
    config = MIMAEConfig(**{**TINY, "num_hidden_layers": 4}, add_fpn=True, attn_implementation="eager")
    model = build_upernet(MIMAEBackbone(config), id2label={0: "a", 1: "b"}, channels=8, auxiliary_channels=8)
    assert model.backbone.config._attn_implementation == "eager"
