"""A Swin of this project is a stock Swin to others, and theirs is one of ours; cards name the right classes."""

import json
from dataclasses import replace

import pytest
import torch
from exporting import export_checkpoint
from huggingface_hub import ModelCard
from references import TINY_SWIN
from safetensors.torch import load_file, save_file
from test_export import LABELS, loaded_by, randomized, snippet_of
from transformers import (
    AutoImageProcessor,
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    SwinModel,
    ViTImageProcessor,
)

from mimae import (
    MIMAEConfig,
    MIMAEModel,
    MISimMIMConfig,
    MISimMIMForImageClassification,
    MISimMIMForPreTraining,
    MISimMIMModel,
)
from mimae.families.family import FAMILIES
from mimae.hub import formats
from mimae.hub.export import TOLERANCE, ExportError, main
from mimae.hub.model_card import write_backbone_card, write_model_card

# 4 x 4 mask units and 2 stages of 2 blocks; the first stage shifts its windows
STOCK_SIZES = {name: value for name, value in TINY_SWIN.items() if name != "mask_patch_size"}
CLASSES = {
    "encoder": MISimMIMModel,
    "pre-training": MISimMIMForPreTraining,
    "classifier": MISimMIMForImageClassification,
}
STOCK_CLASSES = {
    "encoder": SwinModel,
    "pre-training": SwinForMaskedImageModeling,
    "classifier": SwinForImageClassification,
}
NO_TERMS = {"num_masks": 1, "mi_max_weight": 0.0, "mi_min_weight": 0.0}


def checkpoint(folder, kind, **fields):
    """One of ours, saved as training saves it, and the model."""
    labels = LABELS if kind == "classifier" else {}
    model = randomized(CLASSES[kind](MISimMIMConfig(**{**TINY_SWIN, "drop_path_rate": 0.1, **labels, **fields})))
    model.save_pretrained(folder)
    return model


def stock_checkpoint(folder, kind, **fields):
    """A stock model under the names of transformers 4, as transformers saves and the Hub has them; and the model."""
    labels = LABELS if kind == "classifier" else {}
    model = randomized(STOCK_CLASSES[kind](SwinConfig(**{**STOCK_SIZES, **labels, **fields})))
    model.save_pretrained(folder)
    return model


# --- to stock Swin


@pytest.mark.parametrize("size", [{}, {"image_size": [8, 24], "window_size": 2, "num_channels": 5}])
@pytest.mark.parametrize("kind", CLASSES)
def test_what_the_printed_lines_load_is_stock_and_equals_the_checkpoint(tmp_path, capsys, kind, size):
    model = checkpoint(tmp_path / "in", kind, **size)
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), "--to", "swin"]) == 0
    found = loaded_by(snippet_of(capsys.readouterr().out)).eval()
    assert type(found) is (SwinForImageClassification if kind == "classifier" else SwinModel)
    images = torch.randn(2, model.config.num_channels, *model.config.image_size_2d)
    with torch.no_grad():
        expected = model.encode(images)
        tokens = found.base_model(images).last_hidden_state
        torch.testing.assert_close(tokens, expected.last_hidden_state, rtol=0, atol=1e-5)
        if kind == "classifier":
            torch.testing.assert_close(found(images).logits, model(images).logits, rtol=0, atol=1e-5)
            assert found.config.id2label == LABELS["id2label"]
        else:
            torch.testing.assert_close(found(images).pooler_output, expected.pooler_output, rtol=0, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_stock_folder_holds_nothing_of_this_project(tmp_path):
    model = checkpoint(tmp_path / "in", "pre-training")
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1] * 3).save_pretrained(tmp_path / "in")
    export_checkpoint(tmp_path / "in", tmp_path / "out", "swin")
    names = ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "swin"
    assert config["drop_path_rate"] == 0.1
    assert "auto_map" not in config
    assert not set(config) & {"mask_patch_size", "num_masks", "mi_min_weight"}
    _, info = SwinModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "out").image_mean) == [0.1] * 3
    assert any("mask_token" in name for name in model.state_dict())
    assert not any("mask_token" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_larger_images_agree_once_an_image_of_the_own_size_was_seen(tmp_path):
    model = checkpoint(tmp_path / "in", "encoder")
    export_checkpoint(tmp_path / "in", tmp_path / "out", "swin")
    stock = SwinModel.from_pretrained(tmp_path / "out").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.encode(images).last_hidden_state
        assert (stock(images).last_hidden_state - expected).abs().max() > 0.1
        stock(torch.zeros(1, 3, 16, 16))
        torch.testing.assert_close(stock(images).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_a_wrong_configuration_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    checkpoint(tmp_path / "in", "encoder", layer_norm_eps=1e-2)
    family = FAMILIES["misimmim"]
    fields = tuple(name for name in family.stock.fields if name != "layer_norm_eps")
    monkeypatch.setitem(FAMILIES, "misimmim", replace(family, stock=replace(family.stock, fields=fields)))
    with pytest.raises(ExportError, match="outputs of the export differ by"):
        export_checkpoint(tmp_path / "in", tmp_path / "out", "swin")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(("to", "out"), [("vit", "out"), ("timm", "out.pth"), ("mae", "out.pth")])
def test_a_swin_is_refused_by_what_holds_a_vit_and_told_where_it_can_go(tmp_path, capsys, to, out):
    checkpoint(tmp_path / "in", "pre-training")
    assert main([str(tmp_path / "in"), str(tmp_path / out), "--to", to]) == 1
    message = capsys.readouterr().err.rpartition("error: ")[2]
    expected = f"--to {to} has no place for a MISimMIMForPreTraining: export it with --to swin or mimae\n"
    assert message == expected
    assert not (tmp_path / out).exists()


def test_a_vit_is_no_swin(tmp_path):
    MIMAEModel(MIMAEConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "in"
    )
    with pytest.raises(
        ExportError, match="no place for a MIMAEModel: export it with --to vit or timm or mae or mimae"
    ):
        export_checkpoint(tmp_path / "in", tmp_path / "out", "swin")


# --- to this project


@pytest.mark.parametrize("kind", CLASSES)
def test_a_folder_of_ours_keeps_everything(tmp_path, kind):
    model = checkpoint(tmp_path / "in", kind)
    assert export_checkpoint(tmp_path / "in", tmp_path / "out", "mimae") <= TOLERANCE
    again = CLASSES[kind].from_pretrained(tmp_path / "out")
    assert again.config.num_masks == model.config.num_masks
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_another_mask_token_or_decoder_would_be_noticed(tmp_path):
    model = checkpoint(tmp_path / "in", "pre-training")
    images = formats.example_images(model)
    expected = formats.outputs(model, images)["pixels"]
    for name in ("swin.embeddings.mask_token", "decoder.0.weight"):
        with torch.no_grad():
            model.get_parameter(name).mul_(1.1)
        assert (formats.outputs(model, images)["pixels"] - expected).abs().max() > 1e-3, name
        model = MISimMIMForPreTraining.from_pretrained(tmp_path / "in").eval()


@pytest.mark.parametrize("layout", ["new", "legacy"])
@pytest.mark.parametrize("kind", CLASSES)
def test_stock_checkpoints_of_both_layouts_become_plain_simmim(tmp_path, kind, layout):
    stock = stock_checkpoint(tmp_path / "in", kind)
    file = tmp_path / "in" / "model.safetensors"
    assert any("attention.self.query" in name for name in load_file(file))
    if layout == "new":
        save_file(stock.state_dict(), file, metadata={"format": "pt"})
    export_checkpoint(tmp_path / "in", tmp_path / "out", "mimae")
    model = CLASSES[kind].from_pretrained(tmp_path / "out").eval()
    assert {name: getattr(model.config, name) for name in NO_TERMS} == NO_TERMS
    assert model.config.mask_patch_size == 4
    assert not model.config.norm_pix_loss
    ours = model.state_dict()
    assert set(ours) - set(stock.state_dict()) == ({"mi_gate.is_open"} if kind == "pre-training" else set())
    for name, value in stock.state_dict().items():
        assert torch.equal(ours[name], value), name
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = stock.base_model(images).last_hidden_state
        torch.testing.assert_close(model.encode(images).last_hidden_state, expected, rtol=0, atol=1e-5)
        if kind == "classifier":
            assert model.config.id2label == LABELS["id2label"]
            torch.testing.assert_close(model(images).logits, stock(images).logits, rtol=0, atol=1e-5)


def test_what_a_stock_configuration_leaves_out_is_stock(tmp_path):
    # widths and depths differ between the defaults of SwinConfig and of MISimMIMConfig
    stock_checkpoint(tmp_path / "in", "encoder", embed_dim=96, num_heads=[3, 6], layer_norm_eps=1e-5)
    path = tmp_path / "in" / "config.json"
    config = json.loads(path.read_text())
    del config["embed_dim"]
    del config["drop_path_rate"]
    path.write_text(json.dumps(config))
    export_checkpoint(tmp_path / "in", tmp_path / "out", "mimae")
    found = MISimMIMConfig.from_pretrained(tmp_path / "out")
    assert (found.embed_dim, found.drop_path_rate) == (96, SwinConfig().drop_path_rate)


def test_the_published_simmim_keeps_its_units_of_32_pixels(tmp_path):
    sizes = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "image_size": 192, "window_size": 6}
    stock_checkpoint(tmp_path / "in", "pre-training", patch_size=4, encoder_stride=32, **sizes)
    export_checkpoint(tmp_path / "in", tmp_path / "out", "mimae")
    config = MISimMIMConfig.from_pretrained(tmp_path / "out")
    assert (config.mask_patch_size, config.grid_size) == (32, (6, 6))


def test_an_import_goes_on_to_a_stock_swin(tmp_path):
    stock = stock_checkpoint(tmp_path / "in", "pre-training")
    export_checkpoint(tmp_path / "in", tmp_path / "out", "swin")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = SwinModel.from_pretrained(tmp_path / "out").eval()(images).last_hidden_state
        torch.testing.assert_close(found, stock.swin(images).last_hidden_state, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"use_absolute_embeddings": True},
            "use_absolute_embeddings=True: SimMIM's Swin has relative positions alone",
        ),
        ({"encoder_stride": 8}, "encoder_stride=8 must be 4"),
    ],
)
def test_a_swin_of_another_make_is_refused(tmp_path, fields, message):
    stock_checkpoint(tmp_path / "in", "encoder", **fields)
    with pytest.raises(ValueError, match=message):
        export_checkpoint(tmp_path / "in", tmp_path / "out", "mimae")
    assert not (tmp_path / "out").exists()


def test_a_stock_checkpoint_with_missing_parameters_is_refused(tmp_path):
    stock_checkpoint(tmp_path / "in", "pre-training")
    file = tmp_path / "in" / "model.safetensors"
    state = load_file(file)
    del state["swin.embeddings.mask_token"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 parameters of a SwinForMaskedImageModeling, swin\.embeddings\.mask"
    ):
        export_checkpoint(tmp_path / "in", tmp_path / "out", "mimae")


# --- cards


SUMMARY = {"model_type": "misimmim", "final": {"reconstruction_loss": 0.25}}


def test_a_swins_card_names_its_method_and_its_loss(tmp_path):
    card = write_model_card(tmp_path, summary=SUMMARY, recipe={}, pictures=[]).read_text()
    assert "it is called MI-SimMIM" in card
    assert "| L_rec (Eq. 1, with the absolute error) | 0.25 |" in card.splitlines()
    assert "output.pooler_output  # (1, D): one vector an image, the mean of the map below" in card
    card = write_model_card(tmp_path, summary={**SUMMARY, "model_type": "mimae"}, recipe={}, pictures=[]).read_text()
    assert "MI-SimMIM" not in card
    assert "| L_rec (Eq. 1) | 0.25 |" in card.splitlines()
    assert "output.pooler_output  # (1, D): one vector an image\n" in card


@pytest.mark.parametrize(("model_type", "name"), [("mimae", "a masked autoencoder"), ("misimmim", "SimMIM")])
def test_the_card_names_what_is_left_without_information_terms(tmp_path, model_type, name):
    never = {"model_type": model_type, "gate_opened_at_step": None, "gate_threshold": 0.5}
    card = write_model_card(tmp_path, summary=never, recipe={}, pictures=[]).read_text()
    assert f"the encoder is that of {name} with several masks." in card
    weights = {"mi_max_weight": 0.0, "mi_min_weight": 0.0}
    card = write_model_card(tmp_path, summary=never, recipe=weights, pictures=[]).read_text()
    assert f"have weight 0: this is {name} and nothing else." in card


@pytest.mark.parametrize(("stock", "name"), [("vit", "ViTModel"), ("swin", "SwinModel")])
def test_a_backbones_card_names_the_stock_class(tmp_path, stock, name):
    model = next(each.stock for each in FAMILIES.values() if each.stock.format == stock)
    card = write_backbone_card(tmp_path, base_model="a/b", checkpoint="a/c", stock=model).read_text()
    assert f"as a stock `{name}` of" in card
    assert stock in ModelCard.load(tmp_path / "README.md").data.tags
    assert ("add_pooling_layer" in card) == (stock == "vit")
    assert ("class token" in card) == (stock == "vit")
