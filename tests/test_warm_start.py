"""Models for downstream tasks from every kind of checkpoint, and what is refused."""

import logging

import numpy as np
import pytest
import torch
from references import TINY
from safetensors.torch import load_file, save_file
from scipy.interpolate import BSpline, make_interp_spline
from transformers import (
    BertConfig,
    BertModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from mimae import MIMAEBackbone, MIMAEConfig, MIMAEForImageClassification, MIMAEForPreTraining, MIMAEModel
from mimae.configuration_misimmim import MISimMIMConfig
from mimae.families.encoders.swin import geometric_positions, interpolate_table, padding_remark
from mimae.families.family import FAMILIES
from mimae.families.warm_start import Checkpoint, StartingModel, UnfitCheckpointError
from mimae.flags.option import RecipeError
from mimae.modeling_mimae import interpolate_positions
from mimae.modeling_misimmim import MISimMIMForPreTraining, MISimMIMModel

STOCK_FIELDS = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
STOCK = {name: TINY[name] for name in (*STOCK_FIELDS, "intermediate_size")}
TINY_SWIN = {"image_size": 12, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
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
    with pytest.raises(UnfitCheckpointError, match=r"lacks some weights.*layernorm.*averaged patches"):
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
    with pytest.raises(UnfitCheckpointError, match=r"lacks some weights.*classifier"):
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


# --- backbones ------------------------------------------------------------------------------------------------------

DEEP = {**TINY, "num_hidden_layers": 6}
# a pre-trained model or a classifier of every kind that the scripts take
ORIGINS = {
    "mimae": lambda: MIMAEForPreTraining(MIMAEConfig(**DEEP)),
    "mimae_classifier": lambda: MIMAEForImageClassification(MIMAEConfig(**DEEP, **LABELS)),
    "vit_mae": lambda: ViTMAEForPreTraining(ViTMAEConfig(**DEEP)),
    "vit": lambda: ViTModel(ViTConfig(**{**STOCK, "num_hidden_layers": 6})),
    "vit_classifier": lambda: ViTForImageClassification(ViTConfig(**{**STOCK, "num_hidden_layers": 6})),
}


def saved_deep(folder, kind: str) -> torch.nn.Module:
    """Saves one with random weights, and returns its encoder."""
    torch.manual_seed(1)
    model = ORIGINS[kind]()
    encoder = getattr(model, "vit", model)
    with torch.no_grad():
        encoder.embeddings.position_embeddings.normal_()
    model.save_pretrained(folder)
    return encoder


def dense(folder, **fields) -> StartingModel:
    return StartingModel(str(folder), model_type=None, preset=None, fields=fields, is_dense=True)


@pytest.mark.parametrize("kind", ORIGINS)
def test_a_backbone_has_the_encoders_weights_and_the_log_names_what_is_new(tmp_path, caplog, kind):
    encoder = saved_deep(tmp_path, kind)
    start = dense(tmp_path, add_fpn=True, use_relative_position_bias=True)
    with caplog.at_level(logging.INFO):
        backbone = start.load(start.family.backbone_class, start.config())
    assert type(backbone) is MIMAEBackbone
    there, new = encoder.state_dict(), set()
    for name, tensor in backbone.state_dict().items():
        if name in there:
            assert torch.equal(tensor, there[name]), name
        else:
            new.add(name.split(".")[0] if name.startswith("fpn") else name.split(".")[-2])
    assert new == {"fpn", "relative_position_bias"}
    (message,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("new, as")]
    assert "fpn.*.weight" in message
    assert "layers.*.attention.relative_position_bias.table" in message
    assert all(level.shape[1] == 32 for level in backbone(torch.randn(1, 3, 32, 48)).feature_maps)


def test_the_legacy_names_of_published_checkpoints_arrive_in_a_backbone(tmp_path):
    encoder = saved_deep(tmp_path, "vit_mae")
    names = load_file(tmp_path / "model.safetensors")
    assert any("attention.attention.query" in name for name in names)  # or the test would show nothing
    start = dense(tmp_path)
    backbone = start.load(MIMAEBackbone, start.config())
    assert torch.equal(backbone.layers[2].attention.q_proj.weight, encoder.layers[2].attention.q_proj.weight)


@pytest.mark.parametrize("kind", ["mimae", "vit"])
def test_a_backbones_positions_fit_the_recipes_images_and_relative_ones_start_at_zero(tmp_path, caplog, kind):
    encoder = saved_deep(tmp_path, kind)
    start = dense(tmp_path, image_size=32, window_size=3, use_relative_position_embeddings=True)
    with caplog.at_level(logging.INFO):
        backbone = start.load(MIMAEBackbone, start.config())
    positions = encoder.embeddings.position_embeddings
    expected = interpolate_positions(positions, (4, 4), (8, 8))
    assert torch.equal(backbone.embeddings.position_embeddings, expected)
    for depth, layer in enumerate(backbone.layers):
        side = 3 if backbone.config.window_of_block(depth) else 8
        assert layer.attention.relative_positions.height.shape[0] == 2 * side - 1
        assert not layer.attention.relative_positions.height.any()
        assert torch.equal(layer.mlp.fc1.weight, encoder.layers[depth].mlp.fc1.weight)
    assert "interpolated to 32 x 32" in caplog.text
    assert "layers.*.attention.relative_positions.height" in caplog.text


def test_a_backbone_that_was_saved_keeps_its_pyramid_and_its_relative_positions(tmp_path, caplog):
    first = MIMAEBackbone(MIMAEConfig(**DEEP, add_fpn=True, use_relative_position_bias=True))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.normal_()
    first.save_pretrained(tmp_path)
    start = dense(tmp_path)
    with caplog.at_level(logging.INFO):
        second = start.load(MIMAEBackbone, start.config())
    assert all(torch.equal(weight, second.state_dict()[name]) for name, weight in first.state_dict().items())
    assert "new, as" not in caplog.text


def test_a_checkpoint_that_lacks_a_block_is_no_backbone(tmp_path):
    saved_deep(tmp_path, "mimae")
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.2.mlp" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    start = dense(tmp_path, add_fpn=True)
    with pytest.raises(UnfitCheckpointError, match=r"lacks some weights.*layers\.2\.mlp"):
        start.load(MIMAEBackbone, start.config())


def test_a_swin_has_no_backbone_and_others_take_no_fields_of_one(tmp_path):
    config = MISimMIMConfig(**TINY_SWIN, window_size=3, encoder_stride=4, mask_patch_size=4)
    MISimMIMModel(config).save_pretrained(tmp_path / "swin")
    with pytest.raises(RecipeError, match=r"'misimmim' has no backbone.*there is one for mimae"):
        dense(tmp_path / "swin")
    saved_deep(tmp_path / "vit", "mimae")
    with pytest.raises(RecipeError, match=r"add_fpn, window_size: of a 'mimae' for segmentation and detection alone"):
        StartingModel(str(tmp_path / "vit"), model_type=None, preset=None, fields={"window_size": 2, "add_fpn": True})


# --- windows of another size ----------------------------------------------------------------------------------------

SIX = {**TINY_SWIN, "image_size": 24, "window_size": 6, "encoder_stride": 4}
WINDOWS = [(6, 7), (7, 12), (7, 6), (12, 7), (3, 4)]


@pytest.mark.parametrize(("window", "new_window"), [(6, 7), (7, 8), (7, 12)])
def test_offsets_stand_where_the_geometric_series_reaches_the_edge(window, new_window):
    """The ratio q solves 1 + q + … + q^(n - 1) = reach, by the roots of that polynomial and not by bisection."""
    count, reach = window - 1, new_window - 1
    roots = np.roots([*np.ones(count - 1), 1 - reach])
    (ratio,) = [root.real for root in roots if abs(root.imag) < 1e-9 and root.real > 0]
    distances = [sum(ratio**k for k in range(n)) for n in range(1, count + 1)]
    expected = [*(-distance for distance in reversed(distances)), 0.0, *distances]
    np.testing.assert_allclose(geometric_positions(count, reach), expected, atol=1e-4)


def test_where_windows_shrink_offsets_keep_nearly_their_places():
    expected = [sum(1.01**k for k in range(n)) for n in range(1, 7)]
    np.testing.assert_allclose(geometric_positions(6, reach=5)[7:], expected, atol=1e-4)


@pytest.mark.parametrize(("window", "new_window"), WINDOWS)
def test_cubic_polynomials_of_the_offsets_are_reproduced_by_every_head(window, new_window):
    there = geometric_positions(window - 1, new_window - 1)
    here = np.arange(1 - new_window, new_window).clip(there[0], there[-1])  # the bisection ends a little short

    def heads(offsets: np.ndarray) -> torch.Tensor:
        rows, columns = np.meshgrid(offsets, offsets, indexing="ij")
        biases = [rows**3 - 2 * columns, columns**2 * rows + 1, 3 * columns**3 * rows**3, np.ones_like(rows)]
        return torch.from_numpy(np.stack(biases, axis=-1).reshape(-1, len(biases)))

    torch.testing.assert_close(interpolate_table(heads(there), new_window), heads(here), rtol=1e-9, atol=1e-6)


def test_tables_are_those_of_one_dimensional_splines_along_rows_and_columns():
    """An independent reference: SciPy's splines of one dimension, first along one side, then along the other."""
    table = torch.randn(11**2, 3)
    there, here = geometric_positions(5, reach=6), np.arange(-6, 7)

    def along_rows(values: np.ndarray) -> np.ndarray:
        spline: BSpline = make_interp_spline(there, values, k=3)
        return spline(here.clip(there[0], there[-1]))

    square = table.numpy().reshape(11, 11, 3)
    expected = along_rows(along_rows(square).transpose(1, 0, 2)).transpose(1, 0, 2)
    found = interpolate_table(table, 7)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.reshape(13, 13, 3).numpy(), expected, atol=1e-5)


def test_a_table_of_the_same_window_is_untouched():
    table = torch.randn(13**2, 4)
    assert interpolate_table(table, 7) is table


def test_windows_too_small_to_be_interpolated_are_refused():
    with pytest.raises(ValueError, match=r"windows of 2 tokens per side .* window_size=4: keep the window_size"):
        interpolate_table(torch.randn(9, 1), 4)


@pytest.mark.parametrize(
    ("image_size", "window_size", "words"),
    [
        (192, 6, None),
        (224, 7, None),
        (224, 6, "window_size=7 would not pad"),
        (256, 7, "window_size=8 would not pad"),
        ((192, 288), 5, "192 x 288 pixels, and these are padded: window_size=3 would not pad"),
    ],
)
def test_windows_that_do_not_divide_a_map_are_told_with_those_that_do(image_size, window_size, words):
    remark = padding_remark(MISimMIMConfig(image_size=image_size, window_size=window_size))
    assert remark is None if words is None else words in remark


def test_a_swin_gets_the_recipes_windows_and_image_size(tmp_path, caplog):
    torch.manual_seed(1)
    model = MISimMIMForPreTraining(MISimMIMConfig(**SIX, mask_patch_size=4))
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    assert checkpoint.family is FAMILIES["misimmim"]
    with caplog.at_level(logging.INFO):
        encoder = checkpoint.load(MISimMIMModel, checkpoint.config({"image_size": 28, "window_size": 7}))
    assert "windows of 6 x 6 tokens are interpolated to 7 x 7" in caplog.text
    there, state = model.swin.state_dict(), encoder.state_dict()
    tables = [name for name in state if name.endswith("relative_position_bias_table")]
    assert [state[name].shape for name in tables] == [(169, 1), (169, 2)]
    for name, weight in state.items():
        expected = interpolate_table(there[name], 7) if name in tables else there[name]
        assert torch.equal(weight, expected), name
    assert encoder.encode(torch.randn(1, 3, 28, 28)).pooler_output.shape == (1, 16)


def test_a_stock_swin_arrives_whole_whatever_its_config_says_of_masks(tmp_path):
    torch.manual_seed(1)
    # other pixels per token than its encoder_stride of 32 says, which no stock encoder looks at
    stock = SwinModel(SwinConfig(**{**SIX, "encoder_stride": 32}))
    stock.save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    encoder = checkpoint.load(MISimMIMModel, checkpoint.config({})).eval()
    pixel_values = torch.randn(2, 3, 24, 24)
    expected = stock.eval()(pixel_values).pooler_output
    torch.testing.assert_close(encoder.encode(pixel_values).pooler_output, expected)


def test_lists_and_tuples_of_depths_are_the_same(tmp_path):
    MISimMIMModel(MISimMIMConfig(**SIX, mask_patch_size=4)).save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    assert checkpoint.config({"depths": (1, 1), "mlp_ratio": 4}).hidden_size == 16
    with pytest.raises(UnfitCheckpointError, match=r"depths: \[1, 1\] there, \[1, 2\] in the recipe"):
        checkpoint.config({"depths": [1, 2]})
