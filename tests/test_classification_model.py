"""The classifier: what it computes, what it takes from other checkpoints, and how libraries see it."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
    pipeline,
)

from mimae import MIMAEConfig, MIMAEForImageClassification, MIMAEForPreTraining, MIMAEModel

ENCODER = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
NUM_LABELS = 7
HEADS = {"mean": {"fc_norm.weight", "fc_norm.bias"}, "cls": set()}


def config(**overrides) -> MIMAEConfig:
    return MIMAEConfig(**{**ENCODER, **DECODER, "num_labels": NUM_LABELS, **overrides})


def shaken(model: nn.Module) -> nn.Module:
    """No parameter is left at 0 or 1, where a mistake would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16)


def test_mean_pooling_normalises_after_the_mean_and_leaves_out_the_class_token(pixel_values):
    model = shaken(MIMAEForImageClassification(config()))
    tokens = model.vit(pixel_values).hidden_states
    assert tokens is None  # not asked for
    hidden = pixel_values
    hidden = model.vit.embeddings.prepend_class_token(model.vit.embeddings.embed_patches(hidden))
    for layer in model.vit.layers:
        hidden = layer(hidden)
    mean = hidden[:, 1:].mean(dim=1)
    expected = nn.functional.linear(
        nn.functional.layer_norm(mean, (32,), model.fc_norm.weight, model.fc_norm.bias, eps=1e-6),
        model.classifier.weight,
        model.classifier.bias,
    )
    torch.testing.assert_close(model(pixel_values).logits, expected)


def test_class_token_pooling_computes_what_the_stock_vit_computes(pixel_values, tmp_path):
    stock = shaken(ViTForImageClassification(ViTConfig(**ENCODER, num_labels=NUM_LABELS, layer_norm_eps=1e-6)))
    stock.save_pretrained(tmp_path)
    model = MIMAEForImageClassification.from_pretrained(tmp_path, classifier_pooling="cls").eval()
    assert model.config.num_labels == NUM_LABELS
    torch.testing.assert_close(model(pixel_values).logits, stock(pixel_values).logits)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_pre_training_checkpoint_lacks_the_head_and_nothing_else(pooling, tmp_path):
    pretrained = shaken(MIMAEForPreTraining(config()))
    pretrained.save_pretrained(tmp_path)
    model, info = MIMAEForImageClassification.from_pretrained(
        tmp_path, classifier_pooling=pooling, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"} | HEADS[pooling]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    for name, tensor in model.vit.state_dict().items():
        assert torch.equal(tensor, pretrained.vit.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["vit", "vit_mae"])
def test_stock_checkpoints_lack_the_head_and_nothing_else(kind, tmp_path):
    if kind == "vit":
        stock = shaken(ViTModel(ViTConfig(**ENCODER)))
        encoder = stock
    else:
        stock = shaken(ViTMAEForPreTraining(ViTMAEConfig(**ENCODER, **DECODER)))
        encoder = stock.vit
    stock.save_pretrained(tmp_path)  # in the key names of transformers 4
    model, info = MIMAEForImageClassification.from_pretrained(
        tmp_path, classifier_pooling="cls", num_labels=NUM_LABELS, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    for name, tensor in model.vit.state_dict().items():
        assert torch.equal(tensor, encoder.state_dict()[name]), name


def test_a_saved_classifier_comes_back_whole_and_through_the_auto_class(pixel_values, tmp_path):
    labels = dict(enumerate("abcdefg"))
    model = shaken(MIMAEForImageClassification(config(id2label=labels, drop_path_rate=0.2)))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, MIMAEForImageClassification)
    assert loaded.config.id2label == labels
    assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)


def test_the_head_starts_with_a_standard_deviation_of_2e_5():
    classifier = MIMAEForImageClassification(config(num_labels=1000)).classifier
    assert classifier.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert not classifier.bias.any()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_every_parameter_of_a_classifier_gets_a_gradient_positions_too(pooling, pixel_values):
    model = shaken(MIMAEForImageClassification(config(classifier_pooling=pooling))).train()
    model(pixel_values, labels=torch.arange(4)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert model.vit.embeddings.position_embeddings.requires_grad


def test_positions_stay_trainable_after_loading(tmp_path):
    MIMAEForPreTraining(config()).save_pretrained(tmp_path)
    model = MIMAEForImageClassification.from_pretrained(tmp_path)
    assert model.vit.embeddings.position_embeddings.requires_grad
    assert not MIMAEModel.from_pretrained(tmp_path).embeddings.position_embeddings.requires_grad


def test_loss_of_classes_equals_the_hand_value_and_leaves_out_minus_100():
    model = MIMAEForImageClassification(config(num_labels=2)).eval()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0]))
    labels = torch.tensor([0, 1, -100, -100])
    loss = model(torch.randn(4, 3, 16, 16), labels=labels).loss
    # -log of softmax (0, 1): 1.31326 for the first class, 0.31326 for the second
    assert loss.item() == pytest.approx((1.3132617 + 0.3132617) / 2, rel=1e-6)
    assert model(torch.randn(4, 3, 16, 16), labels=torch.full((4,), -100)).loss.item() == 0


def test_one_hot_probabilities_have_the_loss_of_their_classes(pixel_values):
    model = shaken(MIMAEForImageClassification(config()))
    labels = torch.tensor([3, 0, 6, 3])
    soft = nn.functional.one_hot(labels, NUM_LABELS).float()
    torch.testing.assert_close(model(pixel_values, labels=soft).loss, model(pixel_values, labels=labels).loss)


def test_drop_path_grows_linearly_from_0_and_drops_whole_residual_branches(pixel_values):
    model = shaken(MIMAEForImageClassification(config(drop_path_rate=0.4)))
    rates = [
        layer.dropout[1].drop_prob if isinstance(layer.dropout, nn.Sequential) else 0 for layer in model.vit.layers
    ]
    assert rates == pytest.approx([0, 0.2, 0.4])

    layer = copy.deepcopy(model.vit.layers[2])
    tokens = torch.randn(500, 5, 32)
    with torch.no_grad():
        changed = (layer.train()(tokens) - tokens).abs().amax(dim=(1, 2)) > 0
    # both branches of a sample are dropped with probability 0.4²
    assert 1 - changed.float().mean().item() == pytest.approx(0.16, abs=0.05)


def test_drop_path_is_off_in_evaluation_and_adds_no_weights(pixel_values):
    plain = shaken(MIMAEForImageClassification(config()))
    dropping = MIMAEForImageClassification(config(drop_path_rate=0.4)).eval()
    dropping.load_state_dict(plain.state_dict())
    assert torch.equal(dropping(pixel_values).logits, plain(pixel_values).logits)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_drop_path_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(Exception, match="drop_path_rate"):
        config(drop_path_rate=rate)


def test_encode_pools_what_the_classifier_sees_for_any_size(pixel_values):
    for pooling in ("mean", "cls"):
        model = shaken(MIMAEForImageClassification(config(classifier_pooling=pooling)))
        torch.testing.assert_close(
            model.classifier(model.encode(pixel_values).pooler_output), model(pixel_values).logits
        )
        assert model.encode(torch.randn(2, 3, 20, 24)).feature_map.shape == (2, 32, 5, 6)


def test_the_pipelines_of_transformers_take_classifier_and_encoder(tmp_path):
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    model = shaken(MIMAEForImageClassification(config(id2label=dict(enumerate("abcdefg")))))
    encoder = shaken(MIMAEModel(config()))
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    pixels = processor(images=photo, return_tensors="pt")["pixel_values"]

    model.save_pretrained(tmp_path / "classifier")
    processor.save_pretrained(tmp_path / "classifier")
    answers = pipeline("image-classification", model=str(tmp_path / "classifier"))(photo, top_k=7)
    expected = model(pixels).logits.softmax(-1)[0]
    assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(
        dict(zip("abcdefg", expected.tolist(), strict=True)), rel=1e-4
    )

    encoder.save_pretrained(tmp_path / "encoder")
    processor.save_pretrained(tmp_path / "encoder")
    extract = pipeline("image-feature-extraction", model=str(tmp_path / "encoder"))
    features = extract(photo, return_tensors=True)
    torch.testing.assert_close(features, encoder(pixels).last_hidden_state)
    assert torch.equal(features, extract(photo, return_tensors=True))  # unmasked: the same each time


def test_trainer_averages_the_loss_over_accumulated_batches():
    # a model that takes **kwargs is otherwise expected to do it itself, by `num_items_in_batch`
    assert MIMAEForImageClassification.accepts_loss_kwargs is False
    assert MIMAEForPreTraining.accepts_loss_kwargs is False
