"""The model against stock ViTMAE, Algorithm 1 and the official MAE's initialisation; its options, and its errors."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from references import (
    TINY,
    assert_official_mae_statistics,
    club_by_loops,
    gaussian_log_likelihood,
    info_nce_by_loops,
    masks_by_loops,
    noise_for_mask,
    sincos_by_loops,
)
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTMAEConfig, ViTMAEForPreTraining
from transformers.utils import is_flash_attn_2_available

from mimae import MIMAEConfig, MIMAEForPreTraining, MIMAEModel

MAE = {"num_masks": 1, "mi_max_weight": 0, "mi_min_weight": 0}
TERMS = ("reconstruction_loss", "mi_max_loss", "mi_min_loss", "approximation_loss")


def build(**overrides) -> MIMAEForPreTraining:
    return MIMAEForPreTraining(MIMAEConfig(**{**TINY, **overrides}))


def images(num_images: int = 3, channels: int = 3, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randn(num_images, channels, height, width)


def stock_twin(model: MIMAEForPreTraining, **overrides) -> ViTMAEForPreTraining:
    """Stock ViTMAE with the weights of `model` and the positions that stock leaves at zero, from their formula."""
    config = model.config
    fields = {name: getattr(config, name) for name in (*TINY, "num_channels", "layer_norm_eps", "mask_ratio")}
    stock = ViTMAEForPreTraining(ViTMAEConfig(**{**fields, "norm_pix_loss": config.norm_pix_loss, **overrides}))
    shared = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith(("approximator.", "mi_gate.")) and "pos" not in name.rsplit(".", 1)[-1]
    }
    missing, unexpected = stock.load_state_dict(shared, strict=False)
    assert set(missing) == {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    assert not unexpected
    with torch.no_grad():
        stock.vit.embeddings.position_embeddings.copy_(sincos_by_loops(config.grid_size, config.hidden_size))
        stock.decoder.decoder_pos_embed.copy_(sincos_by_loops(config.grid_size, config.decoder_hidden_size))
    return stock


# It is MAE


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("channels", [3, 1])
def test_zero_mi_weights_recover_mae(norm_pix_loss, channels):
    model = build(**MAE, norm_pix_loss=norm_pix_loss, num_channels=channels)
    stock = stock_twin(model)
    pixel_values, noise = images(channels=channels), torch.rand(3, 16)
    output, expected = model(pixel_values, noise=noise), stock(pixel_values, noise=noise)

    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.logits[:, 0], expected.logits)
    assert torch.equal(output.mask[:, 0], expected.mask)
    assert torch.equal(output.ids_restore[:, 0], expected.ids_restore)
    assert torch.equal(output.loss, output.reconstruction_loss)

    output.loss.backward()
    expected.loss.backward()
    grads = {name: parameter.grad for name, parameter in stock.named_parameters() if parameter.requires_grad}
    assert grads.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, grads[name], msg=name)


@pytest.mark.parametrize(("num_masks", "mask_ratio"), [(4, 0.75), (6, 0.75), (2, 0.5), (None, 0.9)])
def test_n_views_are_n_forward_passes_of_vit_mae(num_masks, mask_ratio):
    model = build(num_masks=num_masks, mask_ratio=mask_ratio)
    config = model.config
    pixel_values, noise = images(), torch.rand(3, 16)
    output = model(pixel_values, noise=noise)
    visible = masks_by_loops(noise, config.num_views, config.num_visible)
    stock = stock_twin(model, mask_ratio=1 - (config.num_visible + 0.5) / 16)  # complete masking may see more

    losses = []
    for i in range(config.num_views):
        noise_i = torch.stack([noise_for_mask(visible[b][i], 16) for b in range(3)])
        expected = stock(pixel_values, noise=noise_i)
        assert torch.equal(output.mask[:, i], expected.mask)
        torch.testing.assert_close(output.logits[:, i], expected.logits)
        losses.append(expected.loss)
    torch.testing.assert_close(output.reconstruction_loss, torch.stack(losses).mean())


def test_independent_masks_are_n_forward_passes_of_vit_mae():
    model = build(mask_strategy="independent")
    stock = stock_twin(model)
    pixel_values, noise = images(), torch.rand(3, 4, 16)
    output = model(pixel_values, noise=noise)
    for i in range(4):
        torch.testing.assert_close(output.logits[:, i], stock(pixel_values, noise=noise[:, i]).logits)


def test_unmasked_features_are_vit_mae_with_nothing_masked():
    model = build().eval()
    pixel_values = images()
    in_order = torch.arange(16.0).expand(3, -1)
    expected = stock_twin(model, mask_ratio=0.0).eval().vit(pixel_values, noise=in_order).last_hidden_state
    features = model.vit(pixel_values)
    torch.testing.assert_close(features.last_hidden_state, expected)
    torch.testing.assert_close(features.pooler_output, expected[:, 1:].mean(dim=1))
    for y in range(4):
        for x in range(4):
            torch.testing.assert_close(features.feature_map[:, :, y, x], expected[:, 1 + 4 * y + x])


def test_unmasked_features_are_deterministic_and_equal_in_train_and_eval():
    model, pixel_values = build(), images()
    features = [model.train().vit(pixel_values), model.eval().vit(pixel_values), model.encode(pixel_values)]
    for other in features[1:]:
        for name in ("last_hidden_state", "pooler_output", "feature_map"):
            assert torch.equal(features[0][name], other[name])


def test_encoder_at_another_size_interpolates_positions_as_vit_mae_does():
    model = build(**MAE)
    pixel_values, noise = images(height=24, width=32), torch.rand(3, 48)
    stock = stock_twin(model).vit
    expected = stock(pixel_values, noise=noise, interpolate_pos_encoding=True)
    views = model.vit.forward_masked(pixel_values, noise, interpolate_pos_encoding=True)
    torch.testing.assert_close(views.last_hidden_state, expected.last_hidden_state)
    assert model.encode(pixel_values).feature_map.shape == (3, 32, 6, 8)
    assert model(pixel_values, noise=noise, interpolate_pos_encoding=True).logits.shape == (3, 1, 48, 48)


# Initialisation

WIDE = {"hidden_size": 64, "intermediate_size": 128, "decoder_hidden_size": 32, "decoder_intermediate_size": 64}


@pytest.mark.parametrize("image_size", [16, (8, 24)])
@pytest.mark.parametrize("cls", [MIMAEForPreTraining, MIMAEModel])
def test_initial_statistics_are_the_official_mae(cls, image_size):
    config = MIMAEConfig(**{**TINY, **WIDE, "image_size": image_size})
    assert_official_mae_statistics(cls(config), config.grid_size)


@pytest.mark.parametrize("image_size", [16, (8, 24)])
def test_missing_keys_of_a_checkpoint_start_as_from_scratch(tmp_path, image_size):
    config = MIMAEConfig(**{**TINY, **WIDE, "image_size": image_size})
    config.save_pretrained(tmp_path)
    save_file({"vit.layernorm.weight": torch.ones(64)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for cls in (MIMAEForPreTraining, MIMAEModel):
        assert_official_mae_statistics(cls.from_pretrained(tmp_path), config.grid_size)
    assert MIMAEForPreTraining.from_pretrained(tmp_path).mi_gate.is_open == 0


def test_a_model_materialised_from_the_meta_device_starts_as_from_scratch():
    config = MIMAEConfig(**{**TINY, **WIDE})
    with torch.device("meta"):
        model = MIMAEForPreTraining(config)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(7.0)
    model.init_weights()
    assert_official_mae_statistics(model, config.grid_size)
    assert model.mi_gate.is_open == 0


@pytest.mark.parametrize("train_approximator", [True, False])
def test_what_is_fixed_stays_fixed_after_loading(tmp_path, train_approximator):
    model = build(train_approximator=train_approximator)
    model.save_pretrained(tmp_path)
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    loaded = MIMAEForPreTraining.from_pretrained(tmp_path)
    assert {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad} == fixed
    expected = {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    approximator = {name for name in fixed if name.startswith("approximator.")}
    assert fixed - approximator == expected
    assert bool(approximator) is not train_approximator
    assert not MIMAEModel.from_pretrained(tmp_path).embeddings.position_embeddings.requires_grad


@pytest.mark.parametrize(
    ("name", "encoder_parameters"),
    [
        ("vit-tiny", 5_524_416),
        ("vit-small", 21_665_664),
        ("vit-base", 85_798_656),
        ("vit-large", 303_301_632),
        ("vit-huge", 630_764_800),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, encoder_parameters):
    with torch.device("meta"):
        model = MIMAEModel(MIMAEConfig.preset(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == encoder_parameters


def test_base_preset_with_its_decoder_is_mae_base():
    with torch.device("meta"):
        model = MIMAEForPreTraining(MIMAEConfig.preset("vit-base", **MAE))
    assert sum(parameter.numel() for parameter in model.parameters()) == 111_907_840
    assert model.config.layer_norm_eps == 1e-6


# The terms, and who is moved by them


@pytest.mark.parametrize("unit", ["pooled", "token"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "all"])
def test_terms_are_the_paper_formulas_on_the_model_latents(unit, pooling):
    model = build(approximator_unit=unit, latent_pooling=pooling, mi_gate_threshold=None)
    pixel_values, noise = images(), torch.rand(3, 16)
    with torch.no_grad():
        output = model(pixel_values, noise=noise)
        tokens = model.vit.forward_masked(pixel_values, noise).last_hidden_state.reshape(3, 4, 5, 32)
        latent = {"cls": tokens[:, :, 0], "mean": tokens[:, :, 1:].mean(2), "all": tokens.mean(2)}[pooling]
        torch.testing.assert_close(output.latent_vector, latent)

        embeddings = model.vit.embeddings.patch_embeddings(pixel_values) + sincos_by_loops((4, 4), 32)[:, 1:]
        visible = masks_by_loops(noise, 4, 4)
        x = torch.stack([torch.stack([embeddings[b, visible[b][i]] for i in range(4)]) for b in range(3)])
        mean, variance = model.approximator(x if unit == "token" else x.mean(dim=2, keepdim=True))  # (B, N, V or 1, D)

    latent, mean, variance = latent.double(), mean.double(), variance.double()
    num_gaussians = mean.shape[2]
    nll, club = torch.zeros(2, dtype=torch.float64)
    for v in range(num_gaussians):
        nll -= gaussian_log_likelihood(latent, mean[:, :, v], variance[:, :, v]) / num_gaussians
        club += club_by_loops(latent, mean[:, :, v], variance[:, :, v]) / num_gaussians
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(output.mi_max_loss.double(), info_nce_by_loops(latent, 0.07), **close)
    torch.testing.assert_close(output.approximation_loss.double(), nll, **close)
    torch.testing.assert_close(output.mi_min_loss.double(), club, **close)


@pytest.mark.parametrize("threshold", [None, 1e-9])
def test_loss_is_equation_11_with_each_weight_applied_once(threshold):
    model = build(reconstruction_weight=0.5, mi_max_weight=0.25, mi_min_weight=7, mi_gate_threshold=threshold)
    output = model(images())
    gate = 1 if threshold is None else 0
    assert output.mi_active == gate
    information = 0.25 * output.mi_max_loss + 7 * output.mi_min_loss
    torch.testing.assert_close(output.objective, 0.5 * output.reconstruction_loss + gate * information)
    torch.testing.assert_close(output.loss, output.objective + output.approximation_loss)
    assert information.abs() > 0.1  # or the gate would not show


def gradients(model: MIMAEForPreTraining, term: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a term by parameter, where it has any.

    Keys' biases are left out: softmax does not see them, and their gradient is 0 up to rounding.
    """
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.endswith("k_proj.bias")
    }
    grads = torch.autograd.grad(term, parameters.values(), retain_graph=True, allow_unused=True)
    pairs = zip(parameters, grads, strict=True)
    return {name: grad for name, grad in pairs if grad is not None and grad.abs().max() > 0}


def trainable(model: MIMAEForPreTraining, *parts: str) -> set[str]:
    """Names that should be reached: the trainable parameters of these parts, less the keys' biases."""
    return {
        name
        for name, parameter in model.named_parameters()
        if name.startswith(parts) and "pos" not in name.rsplit(".", 1)[-1] and not name.endswith("k_proj.bias")
    }


@pytest.mark.parametrize("unit", ["pooled", "token"])
@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ("reconstruction_loss", ("vit.", "decoder.")),
        ("mi_max_loss", ("vit.",)),
        ("mi_min_loss", ("vit.",)),
        ("approximation_loss", ("approximator.",)),
        ("objective", ("vit.", "decoder.")),
        ("loss", ("vit.", "decoder.", "approximator.")),
    ],
)
def test_each_term_reaches_exactly_its_own_parameters(term, parts, unit):
    model = build(mi_gate_threshold=None, approximator_unit=unit)
    assert gradients(model, model(images())[term]).keys() == trainable(model, *parts)


def test_positions_are_never_moved():
    model = build(mi_gate_threshold=None)
    assert not model.vit.embeddings.position_embeddings.requires_grad
    output = model(images())
    output.loss.backward()
    assert model.vit.embeddings.position_embeddings.grad is None
    assert model.decoder.decoder_pos_embed.grad is None


def test_one_backward_equals_the_three_of_algorithm_1():
    model = build(mi_gate_threshold=None)
    output = model(images())
    sets = {
        "vit.": output.reconstruction_loss + output.mi_max_loss + 10 * output.mi_min_loss,
        "decoder.": output.reconstruction_loss,
        "approximator.": output.approximation_loss,
    }
    expected = {
        name: grad
        for part, term in sets.items()
        for name, grad in gradients(model, term).items()
        if name.startswith(part)
    }
    output.loss.backward()
    assert expected.keys() == trainable(model, "vit.", "decoder.", "approximator.")
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_a_closed_gate_leaves_reconstruction_alone_to_move_the_encoder():
    model = build(mi_gate_threshold=1e-9)
    output = model(images())
    assert output.mi_active == 0
    expected = gradients(model, output.reconstruction_loss)
    moved = gradients(model, output.loss)
    for name in trainable(model, "vit.", "decoder."):
        torch.testing.assert_close(moved[name], expected[name], rtol=0, atol=0, msg=name)
    assert trainable(model, "approximator.") <= moved.keys()  # V is fitted before the gate opens


def test_an_open_gate_changes_the_gradient_of_the_encoder_only():
    # negative control of the test above
    model = build(mi_gate_threshold=None)
    output = model(images())
    alone, moved = gradients(model, output.reconstruction_loss), gradients(model, output.loss)
    assert not torch.allclose(alone["vit.layers.0.mlp.fc1.weight"], moved["vit.layers.0.mlp.fc1.weight"], rtol=0.1)
    assert torch.equal(alone["decoder.mask_token"], moved["decoder.mask_token"])


def test_an_untrained_approximator_is_frozen_and_its_loss_is_not_in_the_loss():
    model = build(train_approximator=False, mi_gate_threshold=None)
    output = model(images())
    assert not any(parameter.requires_grad for parameter in model.approximator.parameters())
    assert torch.equal(output.loss, output.objective)
    assert output.approximation_loss > 0  # still reported
    output.loss.backward()
    assert gradients(model, model(images()).mi_min_loss).keys() == trainable(model, "vit.")


def test_no_approximator_is_built_where_nothing_is_minimised():
    model = build(mi_min_weight=0, mi_gate_threshold=None)
    assert model.approximator is None
    assert not any("approximator" in name for name in model.state_dict())
    output = model(images())
    assert output.mi_min_loss == output.approximation_loss == 0
    torch.testing.assert_close(output.loss, output.reconstruction_loss + output.mi_max_loss)


def test_negatives_cost_nothing_where_nothing_is_maximised():
    assert build(mi_max_weight=0)(images()).mi_max_loss == 0


# The gate in the model


def test_gate_opens_in_training_only_stays_open_and_survives_a_save(tmp_path):
    model = build(mi_gate_threshold=100.0)
    assert model.eval()(images()).mi_active == 0
    assert model.train()(images()).mi_active == 1
    model.mi_gate.threshold = 0.0
    assert model(images()).mi_active == 1
    assert model.eval()(images()).mi_active == 1

    model.save_pretrained(tmp_path)
    loaded = MIMAEForPreTraining.from_pretrained(tmp_path)
    assert loaded.mi_gate.is_open == 1
    loaded.mi_gate.threshold = 0.0
    assert loaded.train()(images()).mi_active == 1


def test_a_closed_gate_survives_a_save(tmp_path):
    build().save_pretrained(tmp_path)
    assert MIMAEForPreTraining.from_pretrained(tmp_path).mi_gate.is_open == 0


# Shapes, options, precision


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24), (24, 8)])
def test_any_channels_and_any_rectangle(channels, height, width):
    model = build(image_size=(height, width), num_channels=channels)
    output = model(images(2, channels, height, width))
    num_patches = height * width // 16
    num_visible = int(num_patches * 0.25)
    assert output.logits.shape == (2, 4, num_patches, 16 * channels)
    assert output.mask.shape == output.ids_restore.shape == (2, 4, num_patches)
    assert torch.all((1 - output.mask).sum(-1) == num_visible)
    assert output.latent_vector.shape == (2, 4, 32)
    assert output.loss.isfinite()
    assert model.encode(images(2, channels, height, width)).feature_map.shape == (2, 32, height // 4, width // 4)


def test_patches_of_a_rectangle_lie_where_the_convolution_sees_them():
    model = build(image_size=(8, 24))
    pixel_values = images(2, 3, 8, 24)
    target = model.reconstruction_target(pixel_values)
    for y in range(2):
        for x in range(6):
            patch = pixel_values[:, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].permute(0, 2, 3, 1).flatten(1)
            normalised = (patch - patch.mean(-1, keepdim=True)) / (patch.var(-1, keepdim=True) + 1e-6).sqrt()
            torch.testing.assert_close(target[:, 6 * y + x], normalised)


@pytest.mark.parametrize("image_size", [16, (8, 24)])
def test_unpatchify_undoes_patchify(image_size):
    model = build(image_size=image_size)
    pixel_values = images(2, 3, *model.config.image_size_2d)
    assert torch.equal(model.unpatchify(model.patchify(pixel_values)), pixel_values)


def test_masks_of_drawn_noise_differ_between_calls_and_follow_the_seed():
    model, pixel_values = build(), images()
    torch.manual_seed(1)
    first, second = model(pixel_values), model(pixel_values)
    torch.manual_seed(1)
    assert torch.equal(first.mask, model(pixel_values).mask)
    assert not torch.equal(first.mask, second.mask)
    assert torch.all(first.mask.sum(dim=1) == 3)  # drawn masks partition the image, too


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_attention_implementations_agree_with_eager(implementation):
    device, dtype = "cpu", torch.float32
    if implementation == "flash_attention_2":
        if not (torch.cuda.is_available() and is_flash_attn_2_available()):
            pytest.skip("needs CUDA and flash-attn")
        device, dtype = "cuda", torch.bfloat16
    config = MIMAEConfig(**TINY)
    eager = MIMAEForPreTraining._from_config(config, attn_implementation="eager").to(device, dtype)
    other = MIMAEForPreTraining._from_config(MIMAEConfig(**TINY), attn_implementation=implementation)
    other = other.to(device, dtype)
    assert other.decoder.decoder_layers[0].attention.config._attn_implementation == implementation
    other.load_state_dict(eager.state_dict())
    pixel_values, noise = images().to(device, dtype), torch.rand(3, 16, device=device)
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(other(pixel_values, noise).logits, eager(pixel_values, noise).logits, **tolerance)


def test_gradient_checkpointing_changes_no_loss_and_no_gradient():
    model = build(mi_gate_threshold=None)
    pixel_values, noise = images(), torch.rand(3, 16)
    plain = model(pixel_values, noise)
    plain.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    recomputed = []
    for layer in [*model.vit.layers, *model.decoder.decoder_layers]:
        layer.attention.register_forward_pre_hook(lambda *_: recomputed.append(1))
    model.gradient_checkpointing_enable()
    checkpointed = model(pixel_values, noise)
    calls_forward = len(recomputed)
    checkpointed.loss.backward()
    assert len(recomputed) > calls_forward  # blocks ran again in the backward pass
    assert torch.equal(checkpointed.loss, plain.loss)
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], msg=name)


def test_autocast_keeps_the_loss_terms_in_float32():
    model = build(mi_gate_threshold=None)
    pixel_values, noise = images(), torch.rand(3, 16)
    expected = model(pixel_values, noise)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixel_values, noise)
    assert output.logits.dtype == torch.bfloat16  # autocast did act
    for name in (*TERMS, "loss", "objective"):
        assert output[name].dtype == torch.float32
        torch.testing.assert_close(output[name], expected[name], rtol=0.1, atol=0.05)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_loading_in_bfloat16_keeps_the_approximator_in_float32(tmp_path):
    build(mi_gate_threshold=None).save_pretrained(tmp_path)
    model = MIMAEForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.approximator.parameters()} == {torch.float32}
    assert model.vit.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
    output = model(images().bfloat16())
    assert output.loss.isfinite()
    for name in TERMS:
        assert output[name].dtype == torch.float32
    output.loss.backward()


def test_hidden_states_and_attentions_are_over_all_views():
    model = MIMAEForPreTraining._from_config(MIMAEConfig(**TINY), attn_implementation="eager")
    output = model(images(), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(12, 5, 32)] * 3
    assert [tuple(attention.shape) for attention in output.attentions] == [(12, 4, 5, 5)] * 2
    plain = model(images())
    assert plain.hidden_states is None
    assert plain.attentions is None
    features = model.vit(images(), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in features.hidden_states] == [(3, 17, 32)] * 3
    assert [tuple(attention.shape) for attention in features.attentions] == [(3, 4, 17, 17)] * 2


@pytest.mark.parametrize("by_config", [True, False])
def test_return_dict_false_gives_tuples(by_config):
    model = build()
    pixel_values, noise = images(), torch.rand(3, 16)
    loss = model(pixel_values, noise).loss
    features = model.vit(pixel_values).last_hidden_state
    if by_config:
        model.config.return_dict = False
    kwargs = {} if by_config else {"return_dict": False}
    as_tuple, vit_tuple = model(pixel_values, noise, **kwargs), model.vit(pixel_values, **kwargs)
    assert isinstance(as_tuple, tuple)
    assert isinstance(vit_tuple, tuple)
    assert torch.equal(as_tuple[0], loss)
    assert torch.equal(vit_tuple[0], features)


def test_compiles_as_one_graph():
    model = build(mi_gate_threshold=100.0)
    pixel_values, noise = images(), torch.rand(3, 16)
    expected = model(pixel_values, noise)
    expected.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.mi_gate.is_open.zero_()
    torch._dynamo.reset()

    output = torch.compile(model, fullgraph=True, backend="aot_eager")(pixel_values, noise)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss)
    assert output.mi_active == model.mi_gate.is_open == 1  # the gate's state moves inside the graph
    for name, p in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-6, msg=name)


# What is refused


def test_images_of_another_size_are_refused_with_the_remedy():
    model = build()
    for call in (model, model.vit):
        with pytest.raises(ValueError, match=r"24 x 16 .* 16 x 16.*interpolate_pos_encoding"):
            call(images(height=24))


@pytest.mark.parametrize(("height", "width"), [(18, 16), (16, 19)])
def test_sizes_that_patches_do_not_divide_are_refused(height, width):
    model = build()
    for call in (model.encode, lambda x: model(x, interpolate_pos_encoding=True)):
        with pytest.raises(ValueError, match="patch_size"):
            call(images(height=height, width=width))


def test_images_with_other_channels_are_refused():
    with pytest.raises(ValueError, match="channel"):
        build()(images(channels=1))


@pytest.mark.parametrize("strategy", ["orthogonal", "independent"])
@pytest.mark.parametrize("shape", [(3, 15), (3, 17), (2, 16), (3, 3, 16), (3, 4, 15), (16,)])
def test_noise_that_does_not_fit_is_refused(strategy, shape):
    with pytest.raises(ValueError, match="noise"):
        build(mask_strategy=strategy)(images(), noise=torch.rand(shape))


def test_noise_of_the_other_strategy_is_refused():
    # one permutation where the configuration declares independent masks would quietly train another ablation
    with pytest.raises(ValueError, match="noise"):
        build(mask_strategy="independent")(images(), noise=torch.rand(3, 16))
    with pytest.raises(ValueError, match="noise"):
        build(mask_strategy="orthogonal")(images(), noise=torch.rand(3, 4, 16))


# Training by the plain Trainer


class Digits(torch.utils.data.Dataset):
    def __init__(self):
        pixels = load_digits().images[:128].astype(np.float32) / 8 - 1
        self.pixels = torch.from_numpy(pixels).unsqueeze(1)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index]}


def test_the_plain_trainer_trains_saves_and_evaluates(tmp_path):
    model = build(image_size=8, patch_size=2, num_channels=1, norm_pix_loss=False, mi_gate_threshold=None)
    seen_by_metrics = []

    def compute_metrics(prediction) -> dict[str, float]:
        seen_by_metrics.append(prediction.predictions)
        return {"count": float(len(prediction.label_ids))}

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=60,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=24,  # does not divide 128: the last batch is smaller
        learning_rate=1e-3,
        logging_steps=10,
        save_steps=60,
        report_to=[],
        disable_tqdm=True,
        label_names=["pixel_values"],  # as in transformers' own MIM examples: this is what asks for a loss
    )
    data = Digits()
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, compute_metrics=compute_metrics)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert after["eval_loss"] < before
    assert after["eval_count"] == 128
    assert len(seen_by_metrics) == 2

    loaded = MIMAEForPreTraining.from_pretrained(tmp_path / "checkpoint-60").eval()
    pixel_values, noise = data.pixels[:4], torch.rand(4, 16)
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values, noise).loss, model.eval()(pixel_values, noise).loss)


def test_patches_are_embedded_by_one_linear_layer():
    # one weight per value of a patch: a convolution whose stride is its kernel is a linear layer over the patch
    model, pixel_values = build(), images()
    projection = model.vit.embeddings.patch_embeddings.projection
    patch = pixel_values[:, :, 4:8, 8:12].flatten(1)
    expected = F.linear(patch, projection.weight.flatten(1), projection.bias)
    torch.testing.assert_close(model.vit.embeddings.patch_embeddings(pixel_values)[:, 4 + 2], expected)
