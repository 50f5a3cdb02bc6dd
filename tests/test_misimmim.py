"""MI-SimMIM against stock Swin, the official SimMIM's rules and the paper's formulas; its options, and its errors.

What holds of MI-MAE as well is in `test_method`.
"""

import copy

import pytest
import torch
from references import (
    TINY_SWIN,
    assert_normal,
    assert_official_simmim_statistics,
    assert_terms_follow_the_paper,
    assert_uniform,
    masks_by_loops,
    simmim_layer,
)
from safetensors.torch import save_file
from transformers import PreTrainedModel, SwinConfig, SwinForImageClassification, SwinForMaskedImageModeling, SwinModel

from mimae import MISimMIMConfig, MISimMIMForImageClassification, MISimMIMForPreTraining, MISimMIMModel
from mimae.training.optimization import build_adamw, layer_decay_groups

SIMMIM = {"num_masks": 1, "mi_max_weight": 0, "mi_min_weight": 0}
# overrides of a small Swin of 2 stages, with one last token in a mask unit
SHAPES = {
    "2 stages": {},
    "2 stages, units of 2 x 2 last tokens": {"image_size": 32, "mask_patch_size": 8},
    "3 stages, 1 channel": {
        "image_size": 32,
        "depths": [2, 1, 2],
        "num_heads": [2, 4, 4],
        "encoder_stride": 8,
        "mask_patch_size": 8,
        "num_channels": 1,
    },
    "3 stages, units of 2 x 2 last tokens": {
        "image_size": 32,
        "depths": [1, 1, 1],
        "num_heads": [1, 2, 4],
        "encoder_stride": 8,
        "mask_patch_size": 16,
    },
    "windows that do not divide the maps": {"image_size": 20, "window_size": 3},
}
UNITS_OF_2 = SHAPES["2 stages, units of 2 x 2 last tokens"]


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """The model with every parameter random: what starts at 0 or 1 would hide a mix-up."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def build(cls: type[PreTrainedModel] = MISimMIMForPreTraining, **overrides) -> PreTrainedModel:
    return shaken(cls(MISimMIMConfig(**{**TINY_SWIN, **overrides})))


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of all stages."""
    return [block for stage in model.swin.encoder.layers for block in stage.blocks]


def images(model: PreTrainedModel, num_images: int = 3) -> torch.Tensor:
    """Of the size and channels that the model is made for."""
    return torch.randn(num_images, model.config.num_channels, *model.config.image_size_2d)


def noise_for(model: PreTrainedModel, num_images: int = 3) -> torch.Tensor:
    return torch.rand(num_images, *model.config.noise_shape)


def stock_config(config: MISimMIMConfig) -> SwinConfig:
    fields = set(SwinConfig.__dataclass_fields__) & set(config.to_dict()) - {"model_type", "architectures"}
    return SwinConfig(**{name: getattr(config, name) for name in fields})


def stock_twin(model: MISimMIMForPreTraining) -> SwinForMaskedImageModeling:
    """Stock SimMIM with the weights of `model`, under the very same names."""
    stock = SwinForMaskedImageModeling(stock_config(model.config))
    shared = {
        name: value for name, value in model.state_dict().items() if not name.startswith(("approximator.", "mi_gate."))
    }
    stock.load_state_dict(shared)
    return stock


def masked_patches(units: torch.Tensor, config: MISimMIMConfig) -> torch.Tensor:
    """The mask of units (B, L), as stock takes it: one entry for each patch, (B, T), true where masked."""
    rows, columns = (side // config.patch_size for side in config.image_size_2d)
    side = config.mask_patch_size // config.patch_size
    patches = torch.zeros(len(units), rows, columns, dtype=torch.bool)
    for y in range(rows):
        for x in range(columns):
            patches[:, y, x] = units[:, (y // side) * (columns // side) + x // side] > 0
    return patches.flatten(1)


def as_image(logits: torch.Tensor, config: MISimMIMConfig) -> torch.Tensor:
    """Units (B, L, P), each in the order (row, column, channel) → images (B, C, H, W)."""
    height, width = config.image_size_2d
    side = config.mask_patch_size
    image = torch.empty(len(logits), config.num_channels, height, width)
    for unit in range(logits.shape[1]):
        y, x = side * (unit // (width // side)), side * (unit % (width // side))
        pixels = logits[:, unit].view(-1, side, side, config.num_channels)
        image[:, :, y : y + side, x : x + side] = pixels.permute(0, 3, 1, 2)
    return image


def mask_of(visible: list[int], num_units: int) -> torch.Tensor:
    return torch.tensor([float(unit not in visible) for unit in range(num_units)])


# It is SimMIM


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_mi_weights_recover_simmim(shape):
    model = build(**SIMMIM, **SHAPES[shape])
    stock, config = stock_twin(model), model.config
    pixel_values, noise = images(model), noise_for(model)
    output = model(pixel_values, noise=noise)
    visible = masks_by_loops(noise, 1, config.num_visible)
    units = torch.stack([mask_of(visible[b][0], config.num_patches) for b in range(3)])
    expected = stock(pixel_values, bool_masked_pos=masked_patches(units, config))

    assert torch.equal(output.mask[:, 0], units)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(as_image(output.logits[:, 0], config), expected.reconstruction)
    assert torch.equal(output.loss, output.reconstruction_loss)

    output.loss.backward()
    expected.loss.backward()
    grads = {name: parameter.grad for name, parameter in stock.named_parameters()}
    assert grads.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("num_masks", "mask_ratio"), [(2, 0.5), (4, 0.75), (3, 0.5), (None, 0.6)])
@pytest.mark.parametrize("strategy", ["orthogonal", "independent"])
def test_n_views_are_n_forward_passes_of_swin(num_masks, mask_ratio, strategy):
    model = build(num_masks=num_masks, mask_ratio=mask_ratio, mask_strategy=strategy)
    stock, config = stock_twin(model), model.config
    pixel_values, noise = images(model), noise_for(model)
    output = model(pixel_values, noise=noise)
    assert output.logits.shape[1] == config.num_views
    losses = []
    for i in range(config.num_views):
        if strategy == "orthogonal":
            visible = [windows[i] for windows in masks_by_loops(noise, config.num_views, config.num_visible)]
        else:
            visible = [windows[0] for windows in masks_by_loops(noise[:, i], 1, config.num_visible)]
        units = torch.stack([mask_of(units, config.num_patches) for units in visible])
        expected = stock(pixel_values, bool_masked_pos=masked_patches(units, config))
        assert torch.equal(output.mask[:, i], units)
        torch.testing.assert_close(as_image(output.logits[:, i], config), expected.reconstruction)
        losses.append(expected.loss)
    torch.testing.assert_close(output.reconstruction_loss, torch.stack(losses).mean())


@pytest.mark.parametrize("shape", [name for name in SHAPES if not name.startswith("windows")])
def test_the_two_masks_of_half_the_units_are_complementary(shape):
    output = build(**SHAPES[shape])(images(build(**SHAPES[shape])))
    assert torch.equal(output.mask[:, 0], 1 - output.mask[:, 1])
    assert torch.all(output.mask.mean(dim=-1) == 0.5)
    ids = output.ids_restore.argsort(dim=-1)  # the order in which each mask takes the units
    half = ids.shape[-1] // 2
    assert torch.equal(ids[:, 0, :half].sort().values, ids[:, 1, half:].sort().values)


def test_the_masks_of_the_paper_see_18_of_36_units_each():
    config = MISimMIMConfig()
    assert (config.grid_size, config.num_views, config.num_visible, config.noise_shape) == ((6, 6), 2, 18, (36,))


def test_independent_masks_are_not_complementary():
    # negative control: two random halves of 16 units are each other's complement once in 12,870
    mask = build(mask_strategy="independent")(images(build())).mask
    assert not torch.equal(mask[:, 0], 1 - mask[:, 1])


def test_a_view_does_not_depend_on_what_is_masked_in_it():
    model = build(**UNITS_OF_2).eval()
    pixel_values, noise = images(model), noise_for(model)
    views = model.swin.forward_masked(pixel_values, noise)
    first = views.mask[:, 0].view(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = model.swin.forward_masked(pixel_values + 5 * first * torch.randn_like(pixel_values), noise)
    torch.testing.assert_close(changed.latent_vector[:, 0], views.latent_vector[:, 0])
    assert not torch.allclose(changed.latent_vector[:, 1], views.latent_vector[:, 1], atol=1e-3)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_reconstruction_is_the_mean_absolute_error_over_masked_pixels(norm_pix_loss):
    model = build(norm_pix_loss=norm_pix_loss, **UNITS_OF_2)
    pixel_values = images(model)
    output = model(pixel_values)
    errors = []
    for b in range(3):
        for i in range(2):
            for unit in range(16):
                y, x = 8 * (unit // 4), 8 * (unit % 4)
                target = pixel_values[b, :, y : y + 8, x : x + 8].permute(1, 2, 0).flatten()
                if norm_pix_loss:
                    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                if output.mask[b, i, unit] == 1:
                    errors.append((output.logits[b, i, unit] - target).abs().mean())
    torch.testing.assert_close(output.reconstruction_loss, torch.stack(errors).mean())


# The vectors ẑ and X, and the terms


def tokens_of(tokens: torch.Tensor, units: list[int], grid_size: tuple[int, int], side: int) -> torch.Tensor:
    """Of a map of tokens (T, D), row by row, those of these units, which are `side` tokens wide."""
    width = grid_size[1] * side
    taken = []
    for unit in units:
        row, column = divmod(unit, grid_size[1])
        for y in range(row * side, (row + 1) * side):
            taken += [tokens[y * width + x] for x in range(column * side, (column + 1) * side)]
    return torch.stack(taken)


@pytest.mark.parametrize("shape", SHAPES)
def test_latent_and_visible_embeddings_are_those_of_the_visible_units(shape):
    model = build(**SHAPES[shape]).eval()
    stock, config = stock_twin(model).eval(), model.config
    pixel_values, noise = images(model), noise_for(model)
    views = model.swin.forward_masked(pixel_values, noise)
    visible, size = masks_by_loops(noise, 2, config.num_visible), config.mask_patch_size
    embeddings, _ = stock.swin.embeddings(pixel_values)  # (B, T, D₁), of the unmasked image
    assert embeddings.shape[-1] == config.embed_dim != config.hidden_size
    for i in range(2):
        units = torch.stack([mask_of(visible[b][i], config.num_patches) for b in range(3)])
        last = stock.swin(pixel_values, bool_masked_pos=masked_patches(units, config)).last_hidden_state
        for b in range(3):
            tokens = tokens_of(last[b], visible[b][i], config.grid_size, size // config.encoder_stride)
            torch.testing.assert_close(views.latent_vector[b, i], tokens.mean(dim=0))
            patches = tokens_of(embeddings[b], visible[b][i], config.grid_size, size // config.patch_size)
            torch.testing.assert_close(views.visible_embeddings[b, i], patches)


@pytest.mark.parametrize("unit", ["pooled", "token"])
@pytest.mark.parametrize("num_masks", [2, 4])
def test_terms_are_the_paper_formulas_on_the_model_latents(unit, num_masks):
    model = build(approximator_unit=unit, num_masks=num_masks, mi_gate_threshold=None, **UNITS_OF_2)
    pixel_values, noise = images(model), noise_for(model)
    with torch.no_grad():
        output = model(pixel_values, noise=noise)
        x = model.swin.forward_masked(pixel_values, noise).visible_embeddings  # held above
        mean, variance = model.approximator(x if unit == "token" else x.mean(dim=2, keepdim=True))  # (B, N, V or 1, D)

    assert mean.shape[2] == (8 * 16 if unit == "token" else 1)
    assert_terms_follow_the_paper(output, output.latent_vector, mean, variance)


def test_the_mask_token_is_moved_by_the_encoders_terms_alone():
    model = build(mi_gate_threshold=None)
    output, token = model(images(model)), model.swin.embeddings.mask_token
    for name in ("reconstruction_loss", "mi_max_loss", "mi_min_loss"):
        (grad,) = torch.autograd.grad(output[name], token, retain_graph=True)
        assert grad.abs().max() > 0, name
    assert torch.autograd.grad(output.approximation_loss, token, allow_unused=True) == (None,)


# Initialisation

WIDE = {"embed_dim": 64, "num_heads": [4, 8], "num_channels": 3}


@pytest.mark.parametrize("cls", [MISimMIMForPreTraining, MISimMIMModel, MISimMIMForImageClassification])
def test_initial_statistics_are_the_official_simmim(cls):
    assert_official_simmim_statistics(cls(MISimMIMConfig(**{**TINY_SWIN, **WIDE})))


def test_missing_keys_of_a_checkpoint_start_as_from_scratch(tmp_path):
    MISimMIMConfig(**{**TINY_SWIN, **WIDE}).save_pretrained(tmp_path)
    save_file({"swin.layernorm.weight": torch.ones(128)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for cls in (MISimMIMForPreTraining, MISimMIMModel, MISimMIMForImageClassification):
        model = cls.from_pretrained(tmp_path)
        assert_official_simmim_statistics(model)
        assert_relative_positions_by_hand(model)
    assert MISimMIMForPreTraining.from_pretrained(tmp_path).mi_gate.is_open == 0


def test_a_model_materialised_from_the_meta_device_starts_as_from_scratch():
    with torch.device("meta"):
        model = MISimMIMForPreTraining(MISimMIMConfig(**{**TINY_SWIN, **WIDE}))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(7.0)
    for buffer in model.buffers():
        buffer.fill_(7)
    model.init_weights()
    assert_official_simmim_statistics(model)
    assert_relative_positions_by_hand(model)
    assert model.mi_gate.is_open == 0


def assert_relative_positions_by_hand(model: PreTrainedModel):
    """Tokens 0 and 15 of a window of 4 x 4 lie 3 rows and 3 columns apart: the corners of a table of 7 x 7."""
    indexes = [buffer for name, buffer in model.named_buffers() if name.endswith("relative_position_index")]
    assert len(indexes) == 4
    for index in indexes:
        index = index.view(16, 16)
        assert torch.all(index.diagonal() == 24)
        assert (index[0, 15], index[15, 0], index[0, 1], index[0, 4]) == (0, 48, 23, 17)


def test_stock_swin_starts_otherwise_than_the_official_simmim():
    # control of the reference, and of the claim that the initialisation needs a hand
    stock = SwinForMaskedImageModeling(stock_config(MISimMIMConfig(**{**TINY_SWIN, **WIDE})))
    with pytest.raises(AssertionError):
        assert_official_simmim_statistics(stock)
    for name, parameter in stock.named_parameters():
        if name.endswith(("mask_token", "relative_position_bias_table")) or name == "decoder.0.bias":
            assert not parameter.any(), name
        elif parameter.ndim == 4:
            assert_normal(parameter.detach(), 0.02, name)
            with pytest.raises(AssertionError):
                assert_uniform(parameter.detach(), parameter[0].numel() ** -0.5, name)
        elif parameter.ndim == 2:
            assert_normal(parameter.detach(), 0.02, name)


@pytest.mark.parametrize(
    ("name", "encoder_parameters"),
    # (Liu et al. 2021): 28.3, 49.6, 87.8 and 196.5 million with windows of 7 and a classifier of 1000
    [("swin-tiny", 28_288_354), ("swin-small", 49_606_258), ("swin-base", 87_768_224), ("swin-large", 196_532_476)],
)
def test_presets_have_the_published_number_of_parameters(name, encoder_parameters):
    with torch.device("meta"):
        config = MISimMIMConfig.preset(name, image_size=224, window_size=7, num_labels=1000)
        model = MISimMIMForImageClassification(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == encoder_parameters


def test_base_preset_is_the_default_configuration():
    assert MISimMIMConfig.preset("swin-base").to_dict() == MISimMIMConfig().to_dict()


# Features of the whole image


def features_of(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values).last_hidden_state


@pytest.mark.parametrize("image_size", [16, 20, 32, (16, 24), (48, 16)])
def test_unmasked_features_are_stock_swins(image_size):
    model = build(image_size=image_size).eval()
    stock = SwinModel(stock_config(model.config)).eval()
    weights = {name: value for name, value in model.swin.state_dict().items() if name != "embeddings.mask_token"}
    stock.load_state_dict(weights)
    pixel_values = images(model)
    features, expected = model.encode(pixel_values), stock(pixel_values)
    torch.testing.assert_close(features.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(features.pooler_output, expected.pooler_output)
    height, width = (side // 4 for side in model.config.image_size_2d)
    assert features.feature_map.shape == (3, 32, height, width)
    for y in range(height):
        for x in range(width):
            torch.testing.assert_close(features.feature_map[:, :, y, x], expected.last_hidden_state[:, y * width + x])


@pytest.mark.parametrize(("height", "width"), [(24, 24), (20, 36), (16, 24), (48, 16)])
def test_features_at_another_size_are_those_of_a_stock_swin_used_to_the_configured_one(height, width):
    model = build().eval()
    stock = stock_twin(model).swin.eval()
    features_of(stock, images(model))  # decides on shifts at its first image
    pixel_values = torch.randn(2, 3, height, width)
    torch.testing.assert_close(model.encode(pixel_values).last_hidden_state, features_of(stock, pixel_values))
    views = model(pixel_values, interpolate_pos_encoding=True)
    assert views.logits.shape == (2, 2, height * width // 16, 48)


def test_unmasked_features_are_deterministic_and_equal_in_train_and_eval():
    model = build()
    pixel_values = images(model)
    features = [model.train().swin(pixel_values), model.eval().swin(pixel_values), model.encode(pixel_values)]
    for other in features[1:]:
        for name in ("last_hidden_state", "pooler_output", "feature_map"):
            assert torch.equal(features[0][name], other[name])


@pytest.mark.parametrize(
    ("image_size", "other_size"),
    [
        (16, (32, 32)),
        (16, (16, 24)),
        (32, (24, 48)),
        (32, (16, 16)),
    ],
)
def test_features_do_not_depend_on_which_sizes_were_seen_before(image_size, other_size):
    model = build(image_size=image_size).eval()
    pixel_values, other = images(model), torch.randn(2, 3, *other_size)
    first, other_first = model.encode(pixel_values), copy.deepcopy(model).encode(other)
    other_second, second = model.encode(other), model.encode(pixel_values)
    assert torch.equal(first.last_hidden_state, second.last_hidden_state)
    assert torch.equal(other_first.last_hidden_state, other_second.last_hidden_state)

    fresh = build(image_size=image_size).eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.encode(other).last_hidden_state, other_first.last_hidden_state)
    torch.testing.assert_close(fresh.encode(pixel_values).last_hidden_state, first.last_hidden_state)


def test_stock_features_do_depend_on_which_sizes_were_seen_before():
    # the trap that the test above is about: its own copies agree, and disagree after another image
    model = build().eval()
    fresh, used = stock_twin(model).swin.eval(), stock_twin(model).swin.eval()
    large = torch.randn(2, 3, 32, 32)
    features_of(used, images(model))
    assert not torch.allclose(features_of(fresh, large), features_of(used, large), atol=1e-3)


def test_a_map_of_one_window_is_not_shifted_and_larger_ones_are():
    shifts = [block.shift_size for block in blocks_of(build())]
    assert shifts == [0, 2, 0, 0]  # maps of 8 x 8 and 4 x 4 tokens, windows of 4 x 4
    assert [block.shift_size for block in blocks_of(build(image_size=32))] == [0, 2, 0, 2]
    assert [block.shift_size for block in blocks_of(build(image_size=(16, 32)))] == [0, 2, 0, 0]


# Stochastic depth


@pytest.mark.parametrize("cls", [MISimMIMForPreTraining, MISimMIMForImageClassification])
def test_drop_path_grows_linearly_from_0_over_all_stages_in_both_branches(cls):
    first, *others = blocks_of(build(cls, drop_path_rate=0.3))
    for branches in ([block.drop_path for block in others], [block.mlp.drop_path for block in others]):
        assert [branch.drop_prob for branch in branches] == pytest.approx([0.1, 0.2, 0.3])
    tokens = torch.randn(500, 64, 16)
    torch.testing.assert_close(first.train()(tokens, (8, 8)), first.eval()(tokens, (8, 8)))


def test_a_dropped_block_is_the_identity():
    block = blocks_of(build(drop_path_rate=1 - 1e-7))[-1].train()
    tokens = torch.randn(3, 16, 32)
    torch.testing.assert_close(block(tokens, (4, 4))[0], tokens, rtol=0, atol=0)
    assert not torch.allclose(block.eval()(tokens, (4, 4))[0], tokens, atol=0.1)


def test_both_branches_of_a_sample_are_dropped_on_their_own_and_rescaled():
    block = blocks_of(build(drop_path_rate=0.4))[-1].train()
    tokens = torch.randn(1, 16, 32)  # one window
    with torch.no_grad():
        dropped, _ = block(tokens.expand(2000, -1, -1), (4, 4))
        attended = tokens + block.attention(block.layernorm_before(tokens))[0] / 0.6
        block.mlp.drop_path.drop_prob = 0
        cases = {
            "both dropped": tokens,
            "MLP dropped": attended,
            "attention dropped": tokens + block.mlp(block.layernorm_after(tokens)) / 0.6,
            "none dropped": attended + block.mlp(block.layernorm_after(attended)) / 0.6,
        }
    shares = {
        name: (dropped - case).abs().amax(dim=(1, 2)).lt(1e-4).float().mean().item() for name, case in cases.items()
    }
    expected = {"both dropped": 0.16, "MLP dropped": 0.24, "attention dropped": 0.24, "none dropped": 0.36}
    assert shares == pytest.approx(expected, abs=0.05)


def test_state_dict_has_stocks_names_v_and_the_gate():
    model = build(drop_path_rate=0.1)
    ours, stocks = set(model.state_dict()), set(stock_twin(model).state_dict())
    assert stocks < ours
    assert {name.split(".")[0] for name in ours - stocks} == {"approximator", "mi_gate"}


@pytest.mark.parametrize("cls", [MISimMIMForPreTraining, MISimMIMForImageClassification])
def test_drop_path_is_off_in_evaluation_and_adds_no_weights(cls):
    plain, dropping = build(cls).eval(), build(cls, drop_path_rate=0.4).eval()
    dropping.load_state_dict(plain.state_dict())
    pixel_values = images(plain)
    assert torch.equal(dropping.encode(pixel_values).feature_map, plain.encode(pixel_values).feature_map)
    assert not torch.equal(dropping.train().encode(pixel_values).feature_map, plain.encode(pixel_values).feature_map)


# Layers, for layer decay and weight decay


@pytest.mark.parametrize("depths", [[2, 2], [1, 3, 2]])
def test_layers_and_their_scales_are_the_official_simmims(depths):
    overrides = {
        "image_size": 32,
        "depths": depths,
        "num_heads": [2] * len(depths),
        "encoder_stride": 2 ** len(depths),
        "mask_patch_size": 16,
    }
    model = build(MISimMIMForImageClassification, **overrides)
    num_layers = sum(depths) + 2
    encoder = model.swin
    layers = encoder.modules_by_depth()
    assert len(layers) == num_layers - 1
    layer_of = {id(p): layer for layer, module in enumerate(layers) for p in module.parameters()}
    for name, parameter in encoder.named_parameters():
        assert layer_of.get(id(parameter), num_layers - 1) == simmim_layer(name, depths), name

    scale_of = {}
    for group in layer_decay_groups(model, weight_decay=0.05, layer_decay=0.8):
        for name, parameter in group["params"]:
            scale_of[name] = group["lr_scale"]
            is_undecayed = parameter.ndim == 1 or "relative_position_bias_table" in name
            assert group["weight_decay"] == (0 if is_undecayed else 0.05), name
    assert scale_of.keys() == dict(model.named_parameters()).keys()
    for name, scale in scale_of.items():
        layer = simmim_layer(name.removeprefix("swin."), depths)
        assert scale == pytest.approx(0.8 ** (num_layers - 1 - layer), rel=1e-12), name


def test_layers_of_a_base_model_by_hand():
    names = {
        "embeddings.patch_embeddings.projection.weight": 0,
        "encoder.layers.0.blocks.0.attention.q_proj.weight": 1,
        "encoder.layers.0.downsample.reduction.weight": 2,
        "encoder.layers.2.blocks.0.mlp.fc1.bias": 5,
        "encoder.layers.2.downsample.norm.weight": 22,
        "encoder.layers.3.blocks.1.mlp.fc2.weight": 24,
        "layernorm.weight": 25,
    }
    with torch.device("meta"):
        model = MISimMIMForImageClassification(MISimMIMConfig(num_labels=10))
    groups = layer_decay_groups(model, weight_decay=0.05, layer_decay=0.5)
    scales = {name: group["lr_scale"] for group in groups for name, _ in group["params"]}
    for name, layer in names.items():
        assert simmim_layer(name, [2, 2, 18, 2]) == layer, name
        assert scales[f"swin.{name}"] == 0.5 ** (25 - layer), name
    assert scales["classifier.weight"] == 1


def test_mask_token_relative_positions_and_vectors_do_not_decay():
    model = build()
    optimizer = build_adamw(model, weight_decay=0.05, betas=(0.9, 0.999))
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim == 1 or name.endswith(("mask_token", "relative_position_bias_table"))
        assert decay_of[id(parameter)] == (0 if exempt else 0.05), name


# Classification


def test_the_classifier_is_stock_swins():
    model = build(MISimMIMForImageClassification, num_labels=5).eval()
    stock = SwinForImageClassification(SwinConfig(**{**stock_config(model.config).to_dict(), "num_labels": 5})).eval()
    stock.load_state_dict(model.state_dict())
    pixel_values, labels = images(model), torch.tensor([4, 0, 2])
    output, expected = model(pixel_values, labels=labels), stock(pixel_values, labels=labels)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(model.classifier(model.encode(pixel_values).pooler_output), output.logits)


def test_every_parameter_of_a_classifier_gets_a_gradient():
    model = build(MISimMIMForImageClassification, num_labels=5)
    model(images(model), labels=torch.tensor([4, 0, 2])).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# Shapes and attention


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("image_size", [(16, 16), (16, 24), (32, 16)])
def test_any_channels_and_any_rectangle(channels, image_size):
    model = build(image_size=image_size, num_channels=channels)
    output = model(images(model, 2))
    num_units = image_size[0] * image_size[1] // 16
    assert output.logits.shape == (2, 2, num_units, 16 * channels)
    assert output.mask.shape == output.ids_restore.shape == (2, 2, num_units)
    assert output.latent_vector.shape == (2, 2, 32)
    assert output.loss.isfinite()


def test_sdpa_agrees_with_eager_attention():
    eager = shaken(MISimMIMForPreTraining._from_config(MISimMIMConfig(**TINY_SWIN), attn_implementation="eager"))
    sdpa = MISimMIMForPreTraining._from_config(MISimMIMConfig(**TINY_SWIN), attn_implementation="sdpa")
    assert blocks_of(sdpa)[0].attention.config._attn_implementation == "sdpa"
    sdpa.load_state_dict(eager.state_dict())
    pixel_values, noise = images(eager), noise_for(eager)
    outputs = []
    for model in (eager, sdpa):
        outputs.append(model(pixel_values, noise))
        outputs[-1].loss.backward()
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits)
    grads = {name: parameter.grad for name, parameter in eager.named_parameters()}
    for name, parameter in sdpa.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-5, msg=name)


def test_hidden_states_and_attentions_are_over_all_views():
    model = MISimMIMForPreTraining._from_config(MISimMIMConfig(**TINY_SWIN), attn_implementation="eager")
    pixel_values = images(model)
    output = model(pixel_values, output_hidden_states=True, output_attentions=True)
    # the patches, then each stage's last, downsampled; attentions of each stage's last block, over windows
    assert [tuple(state.shape) for state in output.hidden_states] == [(6, 64, 16), (6, 16, 32), (6, 16, 32)]
    assert [tuple(attention.shape) for attention in output.attentions] == [(24, 2, 16, 16), (6, 4, 16, 16)]
    plain = model(pixel_values)
    assert plain.hidden_states is None
    assert plain.attentions is None
    features = model.swin(pixel_values, output_hidden_states=True)
    assert [tuple(state.shape) for state in features.hidden_states] == [(3, 64, 16), (3, 16, 32), (3, 16, 32)]
    expected = stock_twin(model).swin(pixel_values, output_hidden_states=True).hidden_states
    for state, other in zip(features.hidden_states, expected, strict=True):
        torch.testing.assert_close(state, other)


# What is refused


@pytest.mark.parametrize(("height", "width"), [(18, 16), (16, 22)])
def test_sizes_that_the_last_map_does_not_divide_are_refused(height, width):
    with pytest.raises(ValueError, match=rf"{height} x {width} .* encoder_stride=4"):
        build().encode(torch.randn(2, 3, height, width))


@pytest.mark.parametrize(("height", "width"), [(12, 16), (16, 8)])
def test_images_smaller_than_a_window_are_refused_with_the_remedy(height, width):
    model = build()
    for call in (model.encode, lambda x: model(x, interpolate_pos_encoding=True)):
        with pytest.raises(ValueError, match=rf"{height} x {width} .*window.* 16 pixels: enlarge it"):
            call(torch.randn(2, 3, height, width))


def test_sizes_that_the_mask_units_do_not_divide_are_refused_in_pre_training_only():
    model = build(**UNITS_OF_2)
    pixel_values = torch.randn(2, 3, 36, 32)
    assert model.encode(pixel_values).feature_map.shape == (2, 32, 9, 8)
    with pytest.raises(ValueError, match=r"36 x 32 .* mask_patch_size=8"):
        model(pixel_values, interpolate_pos_encoding=True)


def test_images_with_other_channels_are_refused():
    model = build()
    for call in (model, model.encode):
        with pytest.raises(ValueError, match="channel"):
            call(torch.randn(2, 1, 16, 16))


def test_views_need_a_mask_token():
    with pytest.raises(ValueError, match="use_mask_token=True"):
        MISimMIMModel(MISimMIMConfig(**TINY_SWIN)).forward_masked(torch.randn(2, 3, 16, 16))
