"""Checkpoints in every layout that ViTMAE's have had, and what we save."""

import re
from pathlib import Path

import pytest
import torch
from references import TINY
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
)

from mimae import MIMAEConfig, MIMAEForPreTraining, MIMAEModel

LEGACY_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def legacy(name: str) -> str:
    """A parameter's name in transformers 4."""
    name = re.sub(r"^(vit\.|)layers\.", r"\1encoder.layer.", name)
    for new, old in LEGACY_NAMES.items():
        name = name.replace(new, old)
    return name


def broken(name: str) -> str:
    """What transformers 5 writes when it saves a model that it loaded from a legacy file."""
    return legacy(name).replace("decoder.decoder_layers.", "decoder.decoder_encoder.layer.")


LAYOUTS = {"new": lambda name: name, "legacy": legacy, "broken": broken}


@pytest.fixture
def stock() -> ViTMAEForPreTraining:
    """A stock model whose every parameter is random: zero biases would hide a mix-up."""
    model = ViTMAEForPreTraining(ViTMAEConfig(**TINY)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def write(folder: Path, model: torch.nn.Module, layout: str) -> Path:
    model.config.save_pretrained(folder)
    state = {LAYOUTS[layout](name): value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_layouts_differ_as_published():
    assert legacy("vit.layers.3.attention.q_proj.bias") == "vit.encoder.layer.3.attention.attention.query.bias"
    assert legacy("vit.layers.3.mlp.fc2.weight") == "vit.encoder.layer.3.output.dense.weight"
    assert legacy("decoder.decoder_layers.0.attention.o_proj.weight") == (
        "decoder.decoder_layers.0.attention.output.dense.weight"
    )
    assert broken("decoder.decoder_layers.0.mlp.fc1.bias") == "decoder.decoder_encoder.layer.0.intermediate.dense.bias"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_vit_mae_layout_loads_with_nothing_missing_but_v_and_gate(tmp_path, stock, layout):
    write(tmp_path, stock, layout)
    model, info = MIMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"approximator", "mi_gate"}
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    for name, value in stock.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name

    assert model.mi_gate.is_open == 0
    for name, parameter in model.approximator.named_parameters():
        if name.endswith("bias"):
            assert torch.all(parameter == (1 if name == "variance.3.bias" else 0)), name
        else:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.9 * bound < parameter.abs().max() <= bound * (1 + 1e-6), name
    assert model(torch.randn(2, 3, 16, 16)).loss.isfinite()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_encoder_loads_from_every_layout_with_nothing_missing(tmp_path, stock, layout):
    write(tmp_path, stock, layout)
    model, info = MIMAEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    for name, value in stock.vit.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("layout", ["new", "legacy"])
def test_an_encoder_without_a_decoder_loads_too(tmp_path, stock, layout):
    encoder = ViTMAEModel(stock.config)
    encoder.load_state_dict(stock.vit.state_dict())
    write(tmp_path, encoder, layout)
    model, info = MIMAEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    full, info = MIMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"approximator", "mi_gate", "decoder"}
    for name, value in encoder.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
        assert torch.equal(full.vit.state_dict()[name], value), name


def test_stock_reads_its_legacy_layout_as_we_write_it_here(tmp_path, stock):
    # control of the reference: the legacy file of this test is one that transformers itself understands
    loaded, info = ViTMAEForPreTraining.from_pretrained(write(tmp_path, stock, "legacy"), output_loading_info=True)
    assert not info["missing_keys"]
    for name, value in stock.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("source", [None, *LAYOUTS])
def test_saving_and_loading_again_changes_nothing(tmp_path, stock, source):
    if source is None:
        model = MIMAEForPreTraining(MIMAEConfig(**TINY))
    else:
        model = MIMAEForPreTraining.from_pretrained(write(tmp_path, stock, source))
    model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())

    again, info = MIMAEForPreTraining.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    pixel_values, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    assert torch.equal(again(pixel_values, noise).loss, model(pixel_values, noise).loss)

    again.save_pretrained(tmp_path / "twice")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "twice"))
    assert first.keys() == second.keys()


@pytest.mark.parametrize("source", [None, *LAYOUTS])
def test_stock_vit_mae_reads_what_we_save(tmp_path, stock, source):
    if source is None:
        model = MIMAEForPreTraining(MIMAEConfig(**TINY, num_masks=1, mi_max_weight=0, mi_min_weight=0))
    else:
        settings = {"num_masks": 1, "mi_max_weight": 0, "mi_min_weight": 0}
        model = MIMAEForPreTraining.from_pretrained(write(tmp_path, stock, source), **settings)
    model.save_pretrained(tmp_path / "saved")
    loaded, info = ViTMAEForPreTraining.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    pixel_values, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    with torch.no_grad():
        expected, output = model.eval()(pixel_values, noise), loaded.eval()(pixel_values, noise=noise)
    torch.testing.assert_close(output.logits, expected.logits[:, 0])
    torch.testing.assert_close(output.loss, expected.loss)


def test_the_file_of_a_full_model_is_read_by_stock_too(tmp_path):
    # with V and the gate, which stock does not know and leaves aside
    model = MIMAEForPreTraining(MIMAEConfig(**TINY)).eval()
    model.save_pretrained(tmp_path)
    loaded = ViTMAEForPreTraining.from_pretrained(tmp_path).eval()
    pixel_values, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    with torch.no_grad():
        logits = loaded(pixel_values, noise=noise).logits
        torch.testing.assert_close(logits, model(pixel_values, noise).logits[:, 0])  # mask 0 starts the permutation


def test_warm_start_takes_overrides_of_the_recipe(tmp_path, stock):
    model = MIMAEForPreTraining.from_pretrained(
        write(tmp_path, stock, "legacy"), norm_pix_loss=True, layer_norm_eps=1e-6, num_masks=6
    )
    assert (model.config.norm_pix_loss, model.config.layer_norm_eps, model.config.num_masks) == (True, 1e-6, 6)
    assert model.vit.layernorm.eps == 1e-6
