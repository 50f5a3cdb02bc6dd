"""The configuration: what it refuses, presets, derived sizes, and the way through a file."""

import math

import pytest
from huggingface_hub.errors import StrictDataclassError
from references import TINY
from transformers import PreTrainedConfig

from mimae import MIMAEConfig


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
        ({"latent_pooling": "max"}, ["latent_pooling", "mean", "cls", "all"]),
        ({"norm_pix_loss": "yes"}, ["norm_pix_loss", "bool"]),
        ({"mi_min_weight": -1.0}, ["mi_min_weight=-1.0", "not be negative"]),
        ({"mi_max_weight": math.nan}, ["mi_max_weight=nan"]),
        ({"temperature": 0}, ["temperature=0", "positive"]),
        ({"temperature": math.nan}, ["temperature=nan", "positive"]),
        ({"approximator_variance_eps": 0.0}, ["approximator_variance_eps=0.0", "positive"]),
        ({"hidden_size": 30}, ["hidden_size=30", "num_attention_heads=4"]),
        ({"decoder_hidden_size": 18}, ["decoder_hidden_size=18", "multiple of 4"]),
    ],
)
def test_a_bad_configuration_is_refused_by_field_and_remedy(overrides, words):
    with pytest.raises(StrictDataclassError) as error:
        MIMAEConfig(**{**TINY, **overrides})
    for word in words:
        assert word in str(error.value)


def test_an_unknown_preset_names_those_that_exist():
    with pytest.raises(ValueError, match=r"vit-giant.*vit-tiny.*vit-huge"):
        MIMAEConfig.preset("vit-giant")


def test_preset_takes_overrides():
    config = MIMAEConfig.preset("vit-small", num_masks=6, hidden_size=192)
    assert (config.num_masks, config.hidden_size, config.decoder_num_attention_heads) == (6, 192, 12)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"image_size": (8, 24), "num_masks": None, "mi_gate_threshold": None, "approximator_hidden_size": 7}],
)
def test_configuration_survives_json(tmp_path, overrides):
    config = MIMAEConfig(**{**TINY, **overrides})
    config.save_pretrained(tmp_path)
    loaded = MIMAEConfig.from_pretrained(tmp_path)
    for name in MIMAEConfig.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys():
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
