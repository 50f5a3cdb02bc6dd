"""Swin checkpoints in the layouts of transformers 4 and 5 as a start for MI-SimMIM, and what we save."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    SwinModel,
)
from transformers.utils import logging as transformers_logging

from mimae import MISimMIMConfig, MISimMIMForImageClassification, MISimMIMForPreTraining, MISimMIMModel

# a small one with the patches, stages and stride of the published ones, so that mask units of 32 pixels fit
SWIN = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 2, 4, 8],
    "window_size": 2,
    "encoder_stride": 32,
}
LEGACY_NAMES = {
    "attention.relative_position_bias.": "attention.self.",
    "attention.q_proj": "attention.self.query",
    "attention.k_proj": "attention.self.key",
    "attention.v_proj": "attention.self.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def legacy(name: str) -> str:
    """A parameter's name in transformers 4."""
    for new, old in LEGACY_NAMES.items():
        name = name.replace(new, old)
    return name


LAYOUTS = {"new": lambda name: name, "legacy": legacy}


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Every parameter random: zero biases would hide a mix-up."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


@pytest.fixture
def stock() -> SwinForMaskedImageModeling:
    return randomised(SwinForMaskedImageModeling(SwinConfig(**SWIN)))


def write(folder: Path, model: PreTrainedModel, layout: str) -> Path:
    """A checkpoint with the config.json and the tensors that the published ones of this layout have."""
    folder.mkdir(exist_ok=True)
    state = {LAYOUTS[layout](name): value.contiguous() for name, value in model.state_dict().items()}
    # the fields of microsoft/swin-base-simmim-window6-192; `path_norm` is none of SwinConfig's
    fields = (*SWIN, "num_channels", "mlp_ratio", "qkv_bias", "hidden_dropout_prob", "attention_probs_dropout_prob")
    fields += ("drop_path_rate", "hidden_act", "use_absolute_embeddings", "layer_norm_eps", "initializer_range")
    config = {name: getattr(model.config, name) for name in (*fields, "hidden_size", "num_layers")}
    config |= {"model_type": "swin", "architectures": [type(model).__name__], "path_norm": True}
    (folder / "config.json").write_text(json.dumps(config))
    if layout == "legacy":  # there the buffers lie in the file, too
        for name, buffer in model.named_buffers():
            if name.endswith("relative_position_index"):
                state[legacy(name)] = buffer.view(4, 4).clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def warnings() -> list[str]:
    """What transformers warns of from here on."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    transformers_logging.get_logger("transformers").addHandler(handler)
    yield messages
    transformers_logging.get_logger("transformers").removeHandler(handler)


def test_the_legacy_layout_is_as_published():
    block = "swin.encoder.layers.0.blocks.0."
    assert {legacy(name) for name in SwinForMaskedImageModeling(SwinConfig(**SWIN)).state_dict()} >= {
        "swin.embeddings.mask_token",
        "swin.embeddings.patch_embeddings.projection.weight",
        block + "layernorm_before.weight",
        block + "attention.self.relative_position_bias_table",
        block + "attention.self.query.weight",
        block + "attention.self.key.bias",
        block + "attention.self.value.weight",
        block + "attention.output.dense.weight",
        block + "intermediate.dense.weight",
        block + "output.dense.bias",
        "swin.encoder.layers.0.downsample.reduction.weight",
        "swin.layernorm.weight",
        "decoder.0.weight",
    }
    assert legacy(block + "attention.relative_position_bias.relative_position_index") == (
        block + "attention.self.relative_position_index"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stock_reads_its_layouts_as_we_write_them_here(tmp_path, stock, layout):
    # control of the reference: transformers itself understands the files of this test
    folder = write(tmp_path, stock, layout)
    loaded, info = SwinForMaskedImageModeling.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    for name, value in stock.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_swin_layout_loads_with_nothing_missing_but_v_and_gate(tmp_path, stock, layout):
    model, info = MISimMIMForPreTraining.from_pretrained(write(tmp_path, stock, layout), output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"approximator", "mi_gate"}
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    for name, value in stock.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.config.model_type == "misimmim"
    assert model.mi_gate.is_open == 0
    assert model.approximator.variance[3].bias.eq(1).all()

    pixel_values, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 4)
    output = model.eval()(pixel_values, noise)
    patches = output.mask[:, 0].view(2, 2, 2).repeat_interleave(8, 1).repeat_interleave(8, 2).flatten(1).bool()
    reconstruction = stock(pixel_values, bool_masked_pos=patches).reconstruction
    torch.testing.assert_close(model.unpatchify(output.logits[:, 0]), reconstruction)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cls", [MISimMIMModel, MISimMIMForImageClassification])
def test_the_encoder_loads_from_every_layout_without_a_warning_of_it(tmp_path, stock, layout, cls, warnings):
    folder = write(tmp_path, stock, layout)
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} <= {"classifier"}
    assert not info["unexpected_keys"]
    assert not any(word in message for message in warnings for word in ("decoder.", "encoder.", "embeddings."))
    if cls is MISimMIMForImageClassification:  # of its head it is told, so the warnings are heard
        assert any("classifier.weight" in message for message in warnings)
    for name, value in stock.swin.state_dict().items():
        if name != "embeddings.mask_token":  # there is no place for it where nothing is masked
            assert torch.equal(model.base_model.state_dict()[name], value), name
    pixel_values = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.eval().encode(pixel_values).last_hidden_state, stock.swin(pixel_values)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_encoder_without_a_decoder_loads_too(tmp_path, layout):
    encoder = randomised(SwinModel(SwinConfig(**SWIN)))
    folder = write(tmp_path, encoder, layout)
    model, info = MISimMIMModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    full, info = MISimMIMForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"] if not name.endswith("mask_token")} == {
        "approximator",
        "mi_gate",
        "decoder",
    }
    for name, value in encoder.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
        assert torch.equal(full.swin.state_dict()[name], value), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stock_classifier_loads_whole(tmp_path, layout):
    classifier = randomised(SwinForImageClassification(SwinConfig(**SWIN, num_labels=3)))
    folder = write(tmp_path, classifier, layout)
    model, info = MISimMIMForImageClassification.from_pretrained(folder, num_labels=3, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixel_values = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.eval()(pixel_values).logits, classifier(pixel_values).logits)


@pytest.mark.parametrize("source", [None, *LAYOUTS])
def test_saving_and_loading_again_changes_nothing(tmp_path, stock, source):
    if source is None:
        model = randomised(MISimMIMForPreTraining(MISimMIMConfig(**SWIN)))
    else:
        folder = write(tmp_path / source, stock, source)
        model = MISimMIMForPreTraining.from_pretrained(folder).eval()
    model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())

    again, info = MISimMIMForPreTraining.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    pixel_values, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 4)
    assert torch.equal(again.eval()(pixel_values, noise).loss, model(pixel_values, noise).loss)


def test_stock_swin_reads_what_we_save(tmp_path):
    # with V and the gate, which stock does not know and leaves aside
    model = randomised(MISimMIMForPreTraining(MISimMIMConfig(**SWIN)))
    model.save_pretrained(tmp_path)
    loaded, info = SwinForMaskedImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    pixel_values = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded.eval().swin(pixel_values)[0], model.encode(pixel_values).last_hidden_state)


def test_a_pre_trained_model_is_loaded_as_encoder_and_as_classifier(tmp_path):
    model = randomised(MISimMIMForPreTraining(MISimMIMConfig(**SWIN)))
    model.save_pretrained(tmp_path)
    pixel_values = torch.randn(2, 3, 96, 64)
    expected = model.encode(pixel_values).last_hidden_state
    for cls in (MISimMIMModel, MISimMIMForImageClassification):
        loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert {name.split(".")[0] for name in info["missing_keys"]} <= {"classifier"}
        assert not info["unexpected_keys"]
        torch.testing.assert_close(loaded.eval().encode(pixel_values).last_hidden_state, expected)


def test_warm_start_takes_overrides_of_the_recipe(tmp_path, stock):
    model = MISimMIMForPreTraining.from_pretrained(
        write(tmp_path, stock, "legacy"), image_size=128, layer_norm_eps=1e-6, num_masks=4
    )
    assert (model.config.image_size, model.config.layer_norm_eps, model.config.num_masks) == (128, 1e-6, 4)
    assert model.swin.layernorm.eps == 1e-6
    assert model(torch.randn(2, 3, 128, 128)).logits.shape == (2, 4, 16, 32 * 32 * 3)


def test_a_new_approximator_is_in_float32_whatever_the_encoders_precision(tmp_path):
    sizes = {"image_size": 64, "window_size": 2, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4}
    SwinForMaskedImageModeling(SwinConfig(**sizes)).to(torch.bfloat16).save_pretrained(tmp_path)
    model = MISimMIMForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.approximator.parameters()} == {torch.float32}
    assert {p.dtype for p in model.swin.parameters()} == {torch.bfloat16}
