"""MI-MAE against stock ViTMAE and the official MAE's initialisation; its options, and its errors.

What holds of MI-SimMIM as well is in `test_method`.
"""

import pytest
import torch
import torch.nn.functional as F
from references import (
    TINY,
    assert_official_mae_statistics,
    assert_terms_follow_the_paper,
    masks_by_loops,
    noise_for_mask,
    sincos_by_loops,
)
from safetensors.torch import save_file
from transformers import ViTMAEConfig, ViTMAEForPreTraining
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


# The terms


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

    assert_terms_follow_the_paper(output, latent, mean, variance)


def test_positions_are_never_moved():
    model = build(mi_gate_threshold=None)
    assert not model.vit.embeddings.position_embeddings.requires_grad
    output = model(images())
    output.loss.backward()
    assert model.vit.embeddings.position_embeddings.grad is None
    assert model.decoder.decoder_pos_embed.grad is None


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


# What is refused


@pytest.mark.parametrize(("height", "width"), [(18, 16), (16, 19)])
def test_sizes_that_patches_do_not_divide_are_refused(height, width):
    model = build()
    for call in (model.encode, lambda x: model(x, interpolate_pos_encoding=True)):
        with pytest.raises(ValueError, match="patch_size"):
            call(images(height=height, width=width))


def test_images_with_other_channels_are_refused():
    with pytest.raises(ValueError, match="channel"):
        build()(images(channels=1))


def test_patches_are_embedded_by_one_linear_layer():
    # one weight per value of a patch: a convolution whose stride is its kernel is a linear layer over the patch
    model, pixel_values = build(), images()
    projection = model.vit.embeddings.patch_embeddings.projection
    patch = pixel_values[:, :, 4:8, 8:12].flatten(1)
    expected = F.linear(patch, projection.weight.flatten(1), projection.bias)
    torch.testing.assert_close(model.vit.embeddings.patch_embeddings(pixel_values)[:, 4 + 2], expected)
