"""The encoder as a backbone: what its maps are, that windows and relative positions do what they say."""

import itertools

import pytest
import torch
from references import TINY
from transformers import AutoBackbone, ViTConfig, ViTModel

from mimae import MIMAEBackbone, MIMAEConfig, MIMAEForPreTraining, MIMAEModel
from mimae.modeling_mimae import interpolate_positions
from mimae.modeling_mimae_backbone import (
    RelativePositionBias,
    RelativePositionEmbeddings,
    join_windows,
    split_into_windows,
)

SIZES = {**TINY, "num_hidden_layers": 4}  # a grid of 4 x 4 patches
RELATIVE = ("use_relative_position_bias", "use_relative_position_embeddings")


def backbone_of(**fields) -> MIMAEBackbone:
    """A backbone whose relative positions are not zero."""
    torch.manual_seed(0)
    backbone = MIMAEBackbone(MIMAEConfig(**{**SIZES, **fields})).eval()
    for name, parameter in backbone.named_parameters():
        if ".relative_position" in name:
            torch.nn.init.normal_(parameter)
    return backbone


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *(size or (16, 16)), generator=torch.Generator().manual_seed(1))


def last_map(backbone: MIMAEBackbone, pixel_values: torch.Tensor) -> torch.Tensor:
    return backbone(pixel_values).feature_maps[-1]


# --- maps ------------------------------------------------------------------------------------------------------------


def test_the_last_map_is_the_encoders_before_its_last_norm():
    torch.manual_seed(0)
    encoder = MIMAEModel(MIMAEConfig(**SIZES)).eval()
    backbone = backbone_of()
    missing, unexpected = backbone.load_state_dict(encoder.state_dict(), strict=False)
    assert missing == []
    assert unexpected == ["layernorm.weight", "layernorm.bias"]
    tokens = last_map(backbone, images()).flatten(2).transpose(1, 2)
    torch.testing.assert_close(
        encoder.layernorm(tokens), encoder(images()).last_hidden_state[:, 1:], rtol=0, atol=1e-6
    )


def test_maps_are_the_outputs_of_the_blocks_that_out_indices_name():
    torch.manual_seed(0)
    encoder = MIMAEModel(MIMAEConfig(**SIZES)).eval()
    backbone = backbone_of(out_indices=[0, 1, 3])
    backbone.load_state_dict(encoder.state_dict(), strict=False)
    hidden_states = encoder(images(), output_hidden_states=True).hidden_states  # the embeddings', then each block's
    for feature_map, block in zip(backbone(images()).feature_maps, (0, 1, 3), strict=True):
        assert torch.equal(feature_map.flatten(2).transpose(1, 2), hidden_states[block][:, 1:])
    assert backbone.channels == [32, 32, 32]


def test_a_backbone_gives_hidden_states_and_attentions_where_they_are_asked_for():
    output = backbone_of(attn_implementation="eager")(images(), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 5
    assert len(output.attentions) == 4
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, 17))


@pytest.mark.parametrize(("depth", "expected"), [(12, [4, 6, 8, 12]), (24, [8, 12, 16, 24])])
def test_the_pyramid_takes_maes_blocks_by_default(depth: int, expected: list[int]):
    # mmsegmentation's indices 3, 5, 7, 11 and 7, 11, 15, 23 count from the first block
    assert MIMAEConfig(**{**TINY, "num_hidden_layers": depth}, add_fpn=True).out_indices == expected


def test_the_pyramid_has_four_two_one_and_half_times_the_grid():
    backbone = backbone_of(add_fpn=True, out_indices=[1, 2, 3, 4])
    maps = backbone(images(16, 32)).feature_maps
    assert [tuple(feature_map.shape) for feature_map in maps] == [
        (2, 32, 16, 32),
        (2, 32, 8, 16),
        (2, 32, 4, 8),
        (2, 32, 2, 4),
    ]


# --- positions -------------------------------------------------------------------------------------------------------


def test_interpolated_positions_at_the_native_size_are_the_originals():
    positions = torch.randn(1, 17, 32)
    assert torch.equal(interpolate_positions(positions, (4, 4), (4, 4)), positions)
    backbone, encoder = backbone_of(), MIMAEModel(MIMAEConfig(**SIZES))
    assert torch.equal(backbone.embeddings.positions_for((16, 16)), encoder.embeddings.position_embeddings)


@pytest.mark.parametrize("fields", [{}, {"window_size": 3}, *({name: True} for name in RELATIVE)])
@pytest.mark.parametrize("size", [(16, 16), (24, 24), (16, 32), (8, 12)])
def test_images_of_any_size_that_patches_divide(fields: dict, size: tuple[int, int]):
    feature_map = last_map(backbone_of(**fields), images(*size))
    assert feature_map.shape == (2, 32, size[0] // 4, size[1] // 4)
    assert feature_map.isfinite().all()


def test_an_image_that_patches_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="18 pixels is not divisible by patch_size=4"):
        backbone_of()(images(16, 18))


@pytest.mark.parametrize("name", RELATIVE)
def test_relative_positions_change_nothing_before_they_are_trained(name: str):
    torch.manual_seed(0)
    plain = MIMAEBackbone(MIMAEConfig(**SIZES)).eval()
    relative = MIMAEBackbone(MIMAEConfig(**SIZES, **{name: True})).eval()
    relative.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(last_map(relative, images()), last_map(plain, images()), rtol=0, atol=1e-5)


def test_the_bias_table_gives_each_pair_of_patches_the_number_of_its_offset():
    height, width = 2, 3
    bias = RelativePositionBias(2, (height, width), has_class_token=True)
    torch.nn.init.normal_(bias.table)
    torch.nn.init.normal_(bias.class_token)
    added = bias(torch.zeros(1, 2, 1 + height * width, 8), (height, width))[0]  # (heads, T, T)
    patches = list(itertools.product(range(height), range(width)))
    for (i, (row, column)), (j, (other_row, other_column)) in itertools.product(enumerate(patches), repeat=2):
        expected = bias.table[:, row - other_row + height - 1, column - other_column + width - 1]
        assert torch.equal(added[:, 1 + i, 1 + j], expected)
    assert torch.equal(added[:, 0, 1:], bias.class_token[:, :1].expand(2, 6))  # the class token asks
    assert torch.equal(added[:, 1:, 0], bias.class_token[:, 1:2].expand(2, 6))  # it is asked
    assert torch.equal(added[:, 0, 0], bias.class_token[:, 2])


def test_relative_embeddings_add_the_querys_products_with_both_offsets():
    height, width = 2, 3
    embeddings = RelativePositionEmbeddings(8, (height, width))
    torch.nn.init.normal_(embeddings.height)
    torch.nn.init.normal_(embeddings.width)
    query = torch.randn(2, 4, height * width, 8)
    added = embeddings(query, (height, width))
    patches = list(itertools.product(range(height), range(width)))
    for (i, (row, column)), (j, (other_row, other_column)) in itertools.product(enumerate(patches), repeat=2):
        offset = embeddings.height[row - other_row + height - 1] + embeddings.width[column - other_column + width - 1]
        torch.testing.assert_close(added[:, :, i, j], query[:, :, i] @ offset)


def test_relative_embeddings_of_another_grid_are_interpolated_along_each_side():
    embeddings = RelativePositionEmbeddings(1, (2, 2))  # offsets -1, 0, 1
    embeddings.height.data[:, 0] = torch.tensor([0.0, 3.0, 6.0])
    offsets = embeddings.between(embeddings.height, 4)[:, 0, 0]  # offsets 0, 1, 2, 3 of seven
    expected = torch.nn.functional.interpolate(torch.tensor([[[0.0, 3.0, 6.0]]]), size=7, mode="linear")[0, 0, 3:]
    torch.testing.assert_close(offsets, expected)


@pytest.mark.parametrize("name", RELATIVE)
def test_eager_and_sdpa_attention_agree_on_relative_positions(name: str):
    eager = backbone_of(**{name: True}, window_size=3, attn_implementation="eager")
    sdpa = backbone_of(**{name: True}, window_size=3, attn_implementation="sdpa")
    torch.testing.assert_close(last_map(eager, images()), last_map(sdpa, images()), rtol=0, atol=1e-5)


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [{}, *({name: True} for name in RELATIVE)])
def test_one_window_that_covers_the_image_is_global_attention(relative: dict):
    windowed = backbone_of(window_size=4, global_attention_indexes=[], **relative)
    everywhere = backbone_of(window_size=4, global_attention_indexes=[0, 1, 2, 3], **relative)
    everywhere.load_state_dict(windowed.state_dict())
    assert torch.equal(last_map(windowed, images()), last_map(everywhere, images()))


def test_a_window_larger_than_the_image_is_global_attention():
    windowed = backbone_of(window_size=7, global_attention_indexes=[])
    everywhere = backbone_of(window_size=7, global_attention_indexes=[0, 1, 2, 3])
    assert torch.equal(last_map(windowed, images()), last_map(everywhere, images()))


@pytest.mark.parametrize("name", RELATIVE)
def test_offsets_mean_the_same_in_a_window_larger_than_the_image(name: str):
    large = backbone_of(window_size=7, global_attention_indexes=[], **{name: True})
    fitting = backbone_of(window_size=4, global_attention_indexes=[], **{name: True})
    for key, table in large.state_dict().items():
        if ".relative_positions." in key:
            table = table[3:10]  # offsets -3 … 3 of -6 … 6
        elif ".relative_position_bias.table" in key:
            table = table[:, 3:10, 3:10]
        fitting.state_dict()[key].copy_(table)
    torch.testing.assert_close(last_map(large, images()), last_map(fitting, images()), rtol=0, atol=1e-6)


def test_windows_do_not_see_each_other_and_global_blocks_do():
    changed = images()
    changed[:, :, :8, :8] += 1  # the first of 2 x 2 windows
    apart = backbone_of(window_size=2, global_attention_indexes=[])
    difference = (last_map(apart, changed) - last_map(apart, images())).abs().amax(dim=(0, 1))  # (4, 4)
    assert (difference[:2, :2] > 0).all()
    assert (difference[2:] == 0).all()
    assert (difference[:, 2:] == 0).all()
    together = backbone_of(window_size=2, global_attention_indexes=[3])
    assert ((last_map(together, changed) - last_map(together, images())).abs().amax(dim=(0, 1)) > 0).all()


def test_windows_are_cut_row_by_row_padded_with_zeros_and_put_together_again():
    tokens = torch.arange(1.0, 21.0).view(1, 4, 5, 1)
    windows = split_into_windows(tokens, 3)
    assert windows.shape == (4, 3, 3, 1)
    assert windows[0, :, :, 0].tolist() == [[1, 2, 3], [6, 7, 8], [11, 12, 13]]
    assert windows[1, :, :, 0].tolist() == [[4, 5, 0], [9, 10, 0], [14, 15, 0]]
    assert windows[3, :, :, 0].tolist() == [[19, 20, 0], [0, 0, 0], [0, 0, 0]]
    assert torch.equal(join_windows(windows, (4, 5)), tokens)


def test_every_quarter_of_the_blocks_ends_with_a_global_one_by_default():
    config = MIMAEConfig(**{**TINY, "num_hidden_layers": 12}, window_size=2)
    assert [block for block in range(12) if config.window_of_block(block) is None] == [2, 5, 8, 11]


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"add_fpn": True, "out_indices": [1, 2, 3, 4], "use_relative_position_bias": True},
        {"window_size": 3, "use_relative_position_embeddings": True},
    ],
)
def test_a_gradient_reaches_every_trainable_parameter_and_no_other(fields: dict):
    backbone = backbone_of(**fields).train()
    sum((feature_map**2).mean() for feature_map in backbone(images()).feature_maps).backward()
    reached = {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert ("embeddings.cls_token" in reached) == ("window_size" not in fields)


def test_recomputed_activations_give_the_same_gradients():
    plain, recomputing = backbone_of(window_size=3).train(), backbone_of(window_size=3).train()
    recomputing.gradient_checkpointing_enable()
    for backbone in (plain, recomputing):
        last_map(backbone, images()).square().mean().backward()
    for (name, expected), actual in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(actual.grad, expected.grad, msg=name)


def test_class_token_and_positions_do_not_decay():
    names = backbone_of(window_size=3, use_relative_position_embeddings=True).no_weight_decay()
    assert {"embeddings.cls_token", "embeddings.position_embeddings"} < names
    assert len(names) == 2 + 2 * 4


# --- loading ---------------------------------------------------------------------------------------------------------


def test_auto_backbone_makes_one_from_a_configuration():
    config = MIMAEConfig(**SIZES, out_features=["stage2", "stage4"])
    assert type(AutoBackbone.from_config(config)) is MIMAEBackbone
    assert config.out_indices == [2, 4]


def test_stages_that_nobody_named_are_not_written_down(tmp_path):
    MIMAEModel(MIMAEConfig(**SIZES)).save_pretrained(tmp_path / "four")
    shallow = MIMAEModel.from_pretrained(tmp_path / "four", num_hidden_layers=2)
    shallow.save_pretrained(tmp_path / "two")
    assert MIMAEBackbone.from_pretrained(tmp_path / "two").config.out_indices == [2]
    named = MIMAEConfig(**SIZES, out_indices=[1, 3])
    assert MIMAEConfig.from_dict(named.to_dict()).out_features == ["stage1", "stage3"]


def test_a_saved_backbone_is_the_same_again(tmp_path):
    backbone = backbone_of(add_fpn=True, out_indices=[1, 2, 3, 4], use_relative_position_bias=True)
    backbone.save_pretrained(tmp_path)
    again = MIMAEBackbone.from_pretrained(tmp_path).eval()
    assert again.config.out_features == ["stage1", "stage2", "stage3", "stage4"]
    for expected, actual in zip(backbone(images()).feature_maps, again(images()).feature_maps, strict=True):
        assert torch.equal(actual, expected)


def test_a_pretraining_checkpoint_lacks_just_what_is_new(tmp_path):
    torch.manual_seed(1)
    pretrained = MIMAEForPreTraining(MIMAEConfig(**SIZES))
    pretrained.save_pretrained(tmp_path)
    backbone, info = MIMAEBackbone.from_pretrained(
        tmp_path, add_fpn=True, out_indices=[1, 2, 3, 4], use_relative_position_bias=True, output_loading_info=True
    )
    assert all(key.startswith("fpn.") or ".relative_position_bias." in key for key in info["missing_keys"])
    assert not info["unexpected_keys"]
    assert torch.equal(backbone.layers[3].mlp.fc2.weight, pretrained.vit.layers[3].mlp.fc2.weight)
    assert all((layer.attention.relative_position_bias.table == 0).all() for layer in backbone.layers)


def test_a_pyramid_on_a_pretraining_checkpoint_takes_maes_blocks_and_named_ones_must_be_four(tmp_path):
    MIMAEForPreTraining(MIMAEConfig(**SIZES)).save_pretrained(tmp_path)
    assert MIMAEBackbone.from_pretrained(tmp_path, add_fpn=True).config.out_indices == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"pyramid of four maps, but out_indices=\[4\] of 4 blocks: name four"):
        MIMAEBackbone.from_pretrained(tmp_path, add_fpn=True, out_indices=[4])


def test_a_stock_vit_becomes_a_backbone(tmp_path):
    torch.manual_seed(1)
    fields = {name: value for name, value in SIZES.items() if not name.startswith("decoder_")}
    stock = ViTModel(ViTConfig(**fields, layer_norm_eps=1e-6)).eval()
    stock.save_pretrained(tmp_path)
    backbone, info = MIMAEBackbone.from_pretrained(tmp_path, config=MIMAEConfig(**SIZES), output_loading_info=True)
    assert not info["missing_keys"]
    tokens = last_map(backbone.eval(), images()).flatten(2).transpose(1, 2)
    torch.testing.assert_close(stock.layernorm(tokens), stock(images()).last_hidden_state[:, 1:], rtol=0, atol=1e-5)


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict.fromkeys(RELATIVE, True), "two forms of the same: set one"),
        ({"window_size": 0}, "window_size=0 must be at least 1"),
        ({"global_attention_indexes": [1]}, "global_attention_indexes without window_size"),
        ({"window_size": 2, "global_attention_indexes": [4]}, r"global_attention_indexes=\[4\].*0 to 3"),
        ({"add_fpn": True, "out_indices": [4]}, r"pyramid of four maps, but out_indices=\[4\]"),
        ({"out_features": ["stage9"]}, "stage9"),
    ],
)
def test_fields_that_contradict_each_other_are_refused_by_name(fields: dict, message: str):
    with pytest.raises(Exception, match=message):
        MIMAEConfig(**SIZES, **fields)


def test_flash_attention_and_relative_positions_are_refused_together():
    backbone = backbone_of(use_relative_position_bias=True)
    backbone.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="takes no relative positions: use sdpa"):
        backbone(images())
