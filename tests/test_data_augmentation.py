"""Augmentations are timm's, for grey images too; mixing is what the formulas say."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import v2

from mimae.data.batches.randomness import random_state_kept, seed_random_state
from mimae.data.images.augmentation import finetuning_transform, mixing, normalized, probe_transform
from mimae.data.images.decoding import decode_image
from mimae.data.images.transforms import Normalization, evaluation_transform, pretraining_transform
from mimae.tests.data_helpers import encode, photograph

COLOUR, GREY = (decode_image(encode(photograph()), channels) for channels in (3, 1))  # (C, 300, 451)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
STATISTICS = {3: {"mean": MEAN, "std": STD}, 1: {"mean": [0.45], "std": [0.22]}}


def state():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


# Transforms


@pytest.mark.parametrize("seed", range(6))
def test_after_the_crop_fine_tuning_augments_as_timm_does(seed):
    options = {"auto_augment": "rand-m9-mstd0.5-inc1", "mean": MEAN, "std": STD}
    transform = finetuning_transform(48, random_erasing=0.5, **options)
    reference = create_transform(
        48, is_training=True, interpolation="bicubic", re_prob=0.5, re_mode="pixel", re_count=1, **options
    )
    seed_random_state(seed)
    view = transform(COLOUR)
    seed_random_state(seed)
    expected = v2.ToPILImage()(pretraining_transform(48, 0.08)(COLOUR))
    for step in reference.transforms[2:]:  # timm's own crop and flip are left out
        expected = step(expected)
    assert view.dtype == torch.float32
    assert torch.allclose(view, expected, atol=1e-5)


def test_the_steps_of_timm_that_are_compared_are_the_right_ones():
    steps = create_transform(48, is_training=True, auto_augment="rand-m9", re_prob=0.5).transforms
    names = [type(step).__name__ for step in steps]
    assert names[:2] == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip"]
    assert names[2:] == ["RandAugment", "MaybeToTensor", "Normalize", "RandomErasing"]


def operations(channels):
    steps = finetuning_transform(48, **STATISTICS[channels] | {"mean": [0.5] * channels}).transforms
    return {operation.name: operation for operation in steps[2].ops}


@pytest.mark.parametrize("name", operations(1))
def test_each_operation_does_to_a_grey_image_what_it_does_to_the_same_image_in_rgb(name):
    """Grey in three channels stays grey under every one of them."""
    grey = v2.ToPILImage()(GREY[:, :64, :80])
    for seed in range(4):
        views = []
        for image, operation in ((grey, operations(1)[name]), (grey.convert("RGB"), operations(3)[name])):
            operation.prob = 1.0
            seed_random_state(seed)
            views.append(operation(image))
        assert views[0].mode == "L"
        assert np.array_equal(np.stack([np.asarray(views[0])] * 3, axis=2), np.asarray(views[1]))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_keeping_no_bit_of_a_grey_value_is_black(channels, mode):
    """What timm asks for where the magnitude reaches 10, as it does in 2 % of the draws around 9."""
    operation = operations(channels)["PosterizeIncreasing"]
    operation.prob, operation.magnitude, operation.magnitude_std = 1.0, 10, 0
    view = operation(Image.new(mode, (5, 4), "white"))
    assert (view.mode, view.size) == (mode, (5, 4))
    assert not np.asarray(view).any()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, (24, 40)])
def test_fine_tuning_gives_what_the_model_takes(channels, size):
    transform = finetuning_transform(size, **STATISTICS[channels])
    shape = (channels, 8, 8) if size == 8 else (channels, *size)
    for image in ({1: GREY, 3: COLOUR}[channels], torch.zeros(channels, 1, 1, dtype=torch.uint8)):
        for _ in range(10):
            view = transform(image)
            assert (view.dtype, view.shape) == (torch.float32, shape)


def test_the_probe_crops_flips_and_normalises_and_nothing_else():
    seed_random_state(1)
    view = probe_transform(48, mean=MEAN, std=STD)(COLOUR)
    seed_random_state(1)
    assert torch.equal(view, Normalization(MEAN, STD, "cpu")(pretraining_transform(48, 0.08)(COLOUR)))
    evaluation = normalized(evaluation_transform(48), mean=MEAN, std=STD)
    assert torch.equal(evaluation(COLOUR), Normalization(MEAN, STD, "cpu")(evaluation_transform(48)(COLOUR)))


def test_other_numbers_of_channels_do_without_randaugment():
    statistics = {"mean": [0.5] * 5, "std": [0.2] * 5}
    with pytest.raises(ValueError, match="1 or 3 channels, not of 5: set --auto_augment none"):
        finetuning_transform(8, **statistics)
    view = finetuning_transform(8, auto_augment=None, random_erasing=1.0, **statistics)(
        torch.zeros(5, 9, 9, dtype=torch.uint8)
    )
    assert view.shape == (5, 8, 8)
    assert 0 < (view != -2.5).sum() < view.numel()  # a rectangle was erased


@pytest.mark.parametrize("description", ["augmix-m3", "rand-m9-q4", "", "rand-nine-m9.5"])
def test_what_is_no_randaugment_is_refused(description):
    with pytest.raises(ValueError, match=r"auto_augment is .*as 'rand-m9-mstd0.5-inc1'"):
        finetuning_transform(8, auto_augment=description, **STATISTICS[3])


# Random numbers


def test_a_seed_fixes_every_transform_and_the_callers_numbers_stay():
    transform = finetuning_transform(32, random_erasing=1.0, **STATISTICS[3])
    views = []
    before = state()
    for draws in (0, 5):
        with random_state_kept():
            torch.rand(draws), np.random.rand(draws), random.gauss(0, 1)  # must not matter
            seed_random_state(2**62 + 1)
            views.append(transform(COLOUR))
    assert torch.equal(*views)
    assert state() == before


# Mixing


def images(size=4):
    return torch.rand(size, 2, 6, 6)


def test_without_mixing_and_smoothing_there_is_nothing_to_do():
    assert mixing(3, batch_size=5) is None


def test_smoothing_alone_gives_the_labels_of_a_smoothed_cross_entropy():
    clean, labels = images(5), torch.tensor([0, 1, 2, 0, 1])  # odd: nothing is paired
    mixed, soft = mixing(3, batch_size=5, label_smoothing=0.1)(clean.clone(), labels)
    assert torch.equal(mixed, clean)
    logits = torch.randn(5, 3)
    assert torch.isclose(F.cross_entropy(logits, soft), F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_mixup_adds_each_image_to_its_partner_in_the_share_of_its_label():
    clean = images()
    mixed, soft = mixing(4, batch_size=4, mixup=0.8)(clean.clone(), torch.arange(4))
    share = soft[0, 0]
    assert 0 < share < 1
    assert torch.allclose(soft, share * torch.eye(4) + (1 - share) * torch.eye(4).flip(0))
    assert torch.allclose(mixed, share * clean + (1 - share) * clean.flip(0), atol=1e-6)


def test_cutmix_pastes_a_rectangle_of_the_share_of_its_label():
    clean = images()
    for seed in range(5):
        seed_random_state(seed)
        mixed, soft = mixing(4, batch_size=4, cutmix=1.0)(clean.clone(), torch.arange(4))
        pasted = (mixed != clean).any(1)  # (B, h, w)
        assert torch.equal(mixed[0][:, pasted[0]], clean[3][:, pasted[0]])
        assert torch.isclose(pasted[0].float().mean(), soft[0, 3])
        assert torch.allclose(soft.sum(1), torch.ones(4))


def test_with_probability_zero_images_stay_and_labels_are_smoothed():
    clean, labels = images(), torch.tensor([0, 1, 2, 0])
    mix = mixing(3, batch_size=4, mixup=0.8, cutmix=1.0, probability=0.0, label_smoothing=0.3)
    mixed, soft = mix(clean.clone(), labels)
    assert torch.equal(mixed, clean)
    assert torch.allclose(soft, 0.7 * F.one_hot(labels, 3) + 0.1)


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_an_odd_batch_cannot_be_mixed(options):
    with pytest.raises(ValueError, match="--per_device_train_batch_size must be even, not 5"):
        mixing(3, batch_size=5, **options)
