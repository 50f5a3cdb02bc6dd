"""Crops, resizes and normalisation give what their docstrings say."""

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from mimae.data.images.decoding import decode_image
from mimae.data.images.transforms import Normalization, evaluation_transform, pretraining_transform
from mimae.tests.data_helpers import encode, photograph

IMAGE = decode_image(encode(photograph()), 3)  # (3, 300, 451)
BICUBIC = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}


@pytest.mark.parametrize(("image_size", "shape"), [(32, (32, 32)), ((24, 40), (24, 40))])
def test_pretraining_gives_uint8_of_the_size_asked_for(image_size, shape):
    torch.manual_seed(0)
    for image in (IMAGE, IMAGE[:, :1, :1], IMAGE[:, :2, :400]):
        view = pretraining_transform(image_size)(image)
        assert view.shape == (3, *shape)
        assert view.dtype == torch.uint8


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_crop_is_torchvisions_with_the_interpolation_asked_for(interpolation):
    crop = v2.RandomResizedCrop(32, scale=(0.2, 1.0), interpolation=InterpolationMode(interpolation), antialias=True)
    torch.manual_seed(0)
    expected = crop(IMAGE)
    torch.manual_seed(0)
    assert torch.equal(pretraining_transform(32, horizontal_flip=0.0, interpolation=interpolation)(IMAGE), expected)


def test_flip_probabilities_zero_and_one_are_obeyed():
    for probability, expected in ((0.0, IMAGE), (1.0, IMAGE.flip(2))):
        transform = pretraining_transform((300, 451), min_scale=1.0, horizontal_flip=probability)
        transform.transforms[0].ratio = (451 / 300, 451 / 300)
        assert torch.equal(transform(IMAGE), expected)


def test_a_square_evaluation_view_is_torchvisions_resize_and_centre_crop():
    for image in (IMAGE, IMAGE.transpose(1, 2)):
        expected = v2.CenterCrop(224)(v2.Resize(256, **BICUBIC)(image))
        assert torch.equal(evaluation_transform(224)(image), expected)


def test_without_cropping_the_whole_image_is_resized():
    assert torch.equal(evaluation_transform((60, 90), crop_ratio=1)(IMAGE), v2.Resize((60, 90), **BICUBIC)(IMAGE))


@pytest.mark.parametrize("image_size", [(64, 32), (32, 64), (20, 200)])
def test_a_non_square_evaluation_view_is_covered_without_padding(image_size):
    view = evaluation_transform(image_size)(torch.full((3, 50, 70), 255, dtype=torch.uint8))
    assert view.shape == (3, *image_size)
    assert view.min() == 255


def test_normalize_by_hand():
    pixel_values = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    result = Normalization((0.5, 0.2, 0.0), (0.5, 0.1, 0.25), "cpu")(pixel_values)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.flatten(), torch.tensor([-1.0, 0.0, 4.0]))
    assert pixel_values.flatten().tolist() == [0, 51, 255]


def test_normalize_refuses_statistics_for_other_channels():
    with pytest.raises(ValueError, match="1 channels"):
        Normalization((0.5,) * 3, (0.5,) * 3, "cpu")(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
