"""The configurations: what they refuse, presets, derived sizes, and the way through a file."""

import math

import pytest
from huggingface_hub.errors import StrictDataclassError
from references import TINY, TINY_SWIN
from transformers import PreTrainedConfig

from mimae import MIMAEConfig, MISimMIMConfig


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"image_size": 18}, ["image_size=18", "patch_size=4", "16 x 16"]),
        ({"image_size": (16, 18)}, ["image_size=(16, 18)", "patch_size=4", "16 x 16"]),
        ({"image_size": 0}, ["image_size=0"]),
        ({"image_size": (16, 16, 3)}, ["image_size", "length 2"]),
        ({"image_size": 4}, ["mask_ratio", "smaller patches"]),
        ({"patch_size": (4, 4)}, ["patch_size", "square"]),
        ({"mask_ratio": 0.0}, ["mask_ratio=0.0", "between 0"]),
        ({"mask_ratio": 1.0}, ["mask_ratio=1.0", "between 0"]),
        ({"mask_ratio": 1.0, "num_masks": None}, ["mask_ratio=1.0", "between 0"]),
        ({"mask_ratio": math.nan}, ["mask_ratio=nan", "between 0"]),
        ({"num_masks": 0}, ["num_masks=0", "at least 1", "None"]),
        ({"num_masks": 1}, ["num_masks=1", "mi_max_weight", "mi_min_weight", "2 or more"]),
        ({"num_masks": 1, "mi_max_weight": 0}, ["mi_min_weight", "num_masks=1"]),
        ({"num_masks": "4"}, ["num_masks", "int"]),
        ({"num_masks": 4.0}, ["num_masks", "int"]),
        ({"mask_strategy": "orthogonl"}, ["mask_strategy", "orthogonal", "independent"]),
        ({"mi_gate_mode": "open"}, ["mi_gate_mode", "latch", "step"]),
        ({"mi_ramp_steps": -1}, ["mi_ramp_steps=-1", "negative"]),
        ({"latent_pooling": "max"}, ["latent_pooling", "mean", "cls", "all"]),
        ({"norm_pix_loss": "yes"}, ["norm_pix_loss", "bool"]),
        ({"mi_min_weight": -1.0}, ["mi_min_weight=-1.0", "not be negative"]),
        ({"mi_max_weight": math.nan}, ["mi_max_weight=nan"]),
        ({"temperature": 0}, ["temperature=0", "positive"]),
        ({"temperature": math.nan}, ["temperature=nan", "positive"]),
        ({"approximator_variance_eps": 0.0}, ["approximator_variance_eps=0.0", "positive"]),
        ({"hidden_size": 30}, ["hidden_size=30", "num_attention_heads=4"]),
        ({"decoder_hidden_size": 18}, ["decoder_hidden_size=18", "multiple of 4"]),
        ({"decoder_num_hidden_layers": 0}, ["decoder_num_hidden_layers=0", "at least 1"]),
    ],
)
def test_a_bad_configuration_is_refused_by_field_and_remedy(overrides, words):
    with pytest.raises(StrictDataclassError) as error:
        MIMAEConfig(**{**TINY, **overrides})
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"image_size": 18}, ["image_size=18", "mask_patch_size=4", "16 x 16"]),
        ({"image_size": (16, 18)}, ["image_size=(16, 18)", "mask_patch_size=4", "16 x 16"]),
        ({"image_size": (16, 16, 3)}, ["image_size", "length 2"]),
        ({"mask_patch_size": 16}, ["mask_ratio=0.5", "no masked patch"]),
        ({"mask_patch_size": 0}, ["mask_patch_size=0", "whole number"]),
        ({"mask_patch_size": (4, 4)}, ["mask_patch_size", "int"]),
        ({"mask_patch_size": 2}, ["mask_patch_size=2", "multiple of encoder_stride=4"]),
        ({"image_size": 24, "mask_patch_size": 6}, ["mask_patch_size=6", "multiple of encoder_stride=4"]),
        ({"patch_size": (2, 2)}, ["patch_size=(2, 2)", "square"]),
        ({"patch_size": 0}, ["patch_size=0", "whole number"]),
        ({"encoder_stride": 8}, ["encoder_stride=8", "must be 4", "patches of 2 pixels", "2 stages"]),
        ({"depths": [2, 2, 2]}, ["depths=[2, 2, 2]", "num_heads=[2, 4]"]),
        ({"depths": [], "num_heads": []}, ["depths=[]"]),
        ({"num_heads": [3, 4]}, ["num_heads=[3, 4]", "3 do not divide the 16 of stage 1"]),
        ({"num_heads": [2, 5]}, ["num_heads=[2, 5]", "5 do not divide the 32 of stage 2"]),
        ({"window_size": 5}, ["window_size=5", "1..4", "4 x 4 tokens"]),
        ({"window_size": 0}, ["window_size=0", "1..4"]),
        ({"image_size": (16, 32), "window_size": 8}, ["window_size=8", "1..4", "4 x 8 tokens"]),
        ({"use_absolute_embeddings": True}, ["use_absolute_embeddings=True", "leave it False"]),
        ({"drop_path_rate": 1.0}, ["drop_path_rate=1.0"]),
        ({"drop_path_rate": math.nan}, ["drop_path_rate=nan"]),
        ({"mask_ratio": 1.0}, ["mask_ratio=1.0", "between 0"]),
        ({"num_masks": 1}, ["num_masks=1", "mi_max_weight", "mi_min_weight", "2 or more"]),
        ({"temperature": 0}, ["temperature=0", "positive"]),
        ({"num_heads": [2, 0]}, ["num_heads"]),
        ({"depths": [2, 0]}, ["depths"]),
    ],
)
def test_a_bad_swin_configuration_is_refused_by_field_and_remedy(overrides, words):
    with pytest.raises(StrictDataclassError) as error:
        MISimMIMConfig(**{**TINY_SWIN, **overrides})
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("cls", "names"),
    [(MIMAEConfig, "vit-giant.*vit-tiny.*vit-huge"), (MISimMIMConfig, "vit-giant.*swin-tiny.*swin-large")],
)
def test_an_unknown_preset_names_those_that_exist(cls, names):
    with pytest.raises(ValueError, match=names):
        cls.preset("vit-giant")


def test_preset_takes_overrides():
    config = MIMAEConfig.preset("vit-small", num_masks=6, hidden_size=192)
    assert (config.num_masks, config.hidden_size, config.decoder_num_attention_heads) == (6, 192, 12)


ODD_FIELDS = {"image_size": (8, 24), "num_masks": None, "mi_gate_threshold": None, "approximator_hidden_size": 7}


@pytest.mark.parametrize(
    "config",
    [
        MIMAEConfig(**TINY),
        MIMAEConfig(**{**TINY, **ODD_FIELDS}),
        MISimMIMConfig(**TINY_SWIN),
        MISimMIMConfig(**{**TINY_SWIN, **ODD_FIELDS, "window_size": 2}),
    ],
)
def test_configuration_survives_json(tmp_path, config):
    config.save_pretrained(tmp_path)
    loaded = type(config).from_pretrained(tmp_path)
    for name in type(config).__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys():
        value, again = getattr(config, name), getattr(loaded, name)
        assert again == (list(value) if isinstance(value, tuple) else value), name
    for name in ("grid_size", "num_patches", "num_views", "num_visible", "noise_shape", "image_size_2d"):
        assert getattr(loaded, name) == getattr(config, name)


def test_derived_sizes_by_hand():
    config = MIMAEConfig(image_size=(32, 16), patch_size=4, mask_ratio=0.9, num_masks=None)
    assert config.grid_size == (8, 4)
    assert (config.num_patches, config.num_views, config.num_visible) == (32, 10, 4)
    assert config.noise_shape == (32,)
    assert MIMAEConfig(**TINY, mask_strategy="independent").noise_shape == (4, 16)


def test_derived_sizes_of_a_swin_by_hand():
    config = MISimMIMConfig(image_size=(192, 384), mask_ratio=0.6, num_masks=None)
    assert (config.unit_size, config.grid_size) == (32, (6, 12))
    assert (config.num_patches, config.num_views, config.num_visible) == (72, 3, 28)
    assert (config.noise_shape, config.hidden_size) == ((72,), 1024)
    assert MISimMIMConfig(mask_strategy="independent").noise_shape == (2, 36)


def test_the_defaults_of_a_swin_are_simmims_swin_base():
    # configs/swin_base__800ep/simmim_pretrain__swin_base__img192_window6__800ep.yaml and config.py of SimMIM
    config = MISimMIMConfig()
    assert (config.image_size, config.patch_size, config.window_size, config.mask_patch_size) == (192, 4, 6, 32)
    assert (config.embed_dim, list(config.depths), list(config.num_heads)) == (128, [2, 2, 18, 2], [4, 8, 16, 32])
    assert (config.drop_path_rate, config.qkv_bias, config.mlp_ratio, config.norm_pix_loss) == (0, True, 4, False)
