"""Models for downstream tasks from every kind of checkpoint, and what is refused."""

import logging

import pytest
import torch
from references import TINY
from transformers import (
    BertConfig,
    BertModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from mimae import MIMAEConfig, MIMAEForImageClassification, MIMAEForPreTraining, MIMAEModel
from mimae.modeling_mimae import interpolate_positions
from mimae.training.warm_start import Checkpoint, UnfitCheckpointError

STOCK_FIELDS = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
STOCK = {name: TINY[name] for name in (*STOCK_FIELDS, "intermediate_size")}
LABELS = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}


def saved(tmp_path, kind: str) -> tuple[Checkpoint, torch.nn.Module]:
    """A checkpoint with random weights, and its encoder."""
    torch.manual_seed(1)
    if kind == "mimae":
        model = MIMAEForPreTraining(MIMAEConfig(**TINY))
        encoder = model.vit
    elif kind == "vit_mae":
        model = encoder = ViTMAEModel(ViTMAEConfig(**TINY))
    else:
        model = encoder = ViTModel(ViTConfig(**STOCK))
    with torch.no_grad():
        encoder.embeddings.position_embeddings.normal_()
    model.save_pretrained(tmp_path / kind)
    return Checkpoint(str(tmp_path / kind)), encoder


@pytest.mark.parametrize("kind", ["mimae", "vit_mae", "vit"])
@pytest.mark.parametrize("model_class", [MIMAEModel, MIMAEForImageClassification])
def test_the_encoder_of_every_kind_of_checkpoint_arrives_whole(tmp_path, kind, model_class):
    checkpoint, encoder = saved(tmp_path, kind)
    config = checkpoint.config({"classifier_pooling": "cls"}, **LABELS)
    model = checkpoint.load(model_class, config)
    there = encoder.state_dict()
    for name, tensor in model.base_model.state_dict().items():
        assert torch.equal(tensor, there[name]), name
    assert model.config.id2label == LABELS["id2label"]


def test_positions_are_interpolated_to_the_recipes_image_size_and_that_is_said(tmp_path, caplog):
    checkpoint, encoder = saved(tmp_path, "mimae")
    config = checkpoint.config({"image_size": [24, 32]}, **LABELS)
    with caplog.at_level(logging.INFO):
        model = checkpoint.load(MIMAEForImageClassification, config)
    assert "interpolated to 24 x 32" in caplog.text
    positions = encoder.embeddings.position_embeddings
    expected = interpolate_positions(positions, encoder.config.grid_size, (6, 8))
    assert torch.equal(model.base_model.embeddings.position_embeddings, expected)
    assert model(torch.randn(1, 3, 24, 32)).logits.shape == (1, 2)
    for name, tensor in model.base_model.layers.state_dict().items():
        assert torch.equal(tensor, encoder.layers.state_dict()[name])


@pytest.mark.parametrize(("field", "value"), [("num_channels", 1), ("hidden_size", 64), ("patch_size", 8)])
def test_a_recipe_that_asks_for_other_weights_is_refused_by_field(tmp_path, field, value):
    checkpoint, _ = saved(tmp_path, "mimae")
    with pytest.raises(UnfitCheckpointError, match=rf"{field}: \d+ there, {value} in the recipe"):
        checkpoint.config({field: value})


def test_a_recipe_may_repeat_what_the_checkpoint_says_and_set_what_touches_no_weight(tmp_path):
    checkpoint, _ = saved(tmp_path, "mimae")
    config = checkpoint.config({"hidden_size": TINY["hidden_size"], "drop_path_rate": 0.1})
    assert config.drop_path_rate == 0.1
    assert config.model_type == "mimae"


def test_a_classifier_keeps_its_head_for_the_same_classes_and_gets_a_new_one_for_others(tmp_path, caplog):
    model = MIMAEForImageClassification(MIMAEConfig(**TINY, **LABELS))
    model.classifier.weight.data.normal_()
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    assert checkpoint.is_classifier
    same = checkpoint.load(MIMAEForImageClassification, checkpoint.config({}), with_head=True)
    assert torch.equal(same.classifier.weight, model.classifier.weight)
    assert same.config.id2label == LABELS["id2label"]

    three = {"id2label": dict(enumerate("abc")), "label2id": {name: i for i, name in enumerate("abc")}}
    with caplog.at_level(logging.INFO):
        other = checkpoint.load(MIMAEForImageClassification, checkpoint.config({}, **three))
    assert other.classifier.weight.shape == (3, TINY["hidden_size"])
    assert "no head that fits" in caplog.text
    assert torch.equal(other.fc_norm.weight, model.fc_norm.weight)


def test_a_checkpoint_that_lacks_a_part_of_the_encoder_is_refused(tmp_path):
    # of a classifier on averaged patches the encoder's last norm is gone
    MIMAEForImageClassification(MIMAEConfig(**TINY)).save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    with pytest.raises(UnfitCheckpointError, match=r"lacks 2 weights.*layernorm"):
        checkpoint.load(MIMAEForImageClassification, checkpoint.config({"classifier_pooling": "cls"}))


def test_the_stock_vits_classifier_is_taken_for_what_it_is(tmp_path):
    stock = ViTForImageClassification(ViTConfig(**STOCK, num_labels=5)).eval()
    torch.nn.init.normal_(stock.classifier.weight)
    stock.save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    model = checkpoint.load(MIMAEForImageClassification, checkpoint.config({}), with_head=True).eval()
    pixel_values = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(pixel_values).logits, stock(pixel_values).logits)


def test_a_head_that_must_be_there_is_missed(tmp_path):
    checkpoint, _ = saved(tmp_path, "mimae")
    with pytest.raises(UnfitCheckpointError, match=r"lacks 4 weights.*classifier"):
        checkpoint.load(MIMAEForImageClassification, checkpoint.config({}), with_head=True)


def test_a_file_that_is_cut_short_is_named(tmp_path):
    checkpoint, _ = saved(tmp_path, "mimae")
    path = tmp_path / "mimae" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UnfitCheckpointError, match="cannot be read"):
        checkpoint.load(MIMAEModel, checkpoint.config({}))


def test_half_precision_checkpoints_are_trained_in_float32(tmp_path):
    MIMAEForPreTraining(MIMAEConfig(**TINY)).to(torch.bfloat16).save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    assert checkpoint.load(MIMAEModel, checkpoint.config({})).dtype == torch.float32


def test_mean_and_deviation_come_from_the_image_processor(tmp_path):
    checkpoint, _ = saved(tmp_path, "mimae")
    assert checkpoint.channel_statistics() == (None, None)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(checkpoint.path)
    assert checkpoint.channel_statistics() == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_what_is_no_checkpoint_of_a_vit_is_refused_by_name(tmp_path):
    with pytest.raises(UnfitCheckpointError, match="nowhere"):
        Checkpoint(str(tmp_path / "nowhere"))
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path)
    with pytest.raises(UnfitCheckpointError, match="'bert' model"):
        Checkpoint(str(tmp_path))
