"""Classes, folders, tables and corruptions of ImageNet's offspring, against timm's lists and hand-computed values."""

import configparser
import io
import json
import pickle
import sys
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs
from torch.utils.data import DataLoader

import mimae
from mimae.data.images.transforms import evaluation_transform
from mimae.evaluation.corruptions import CorruptedTransform
from mimae.evaluation.robustness import (
    ALEXNET_ERRORS,
    ARCHIVES,
    CORRUPTIONS,
    SEVERITIES,
    RestrictedClassifier,
    class_positions,
    corruption_folders,
    corruption_markdown,
    corruption_table,
    imagenet_wnids,
)

ALEXNET = {(name, severity): error for name, error in ALEXNET_ERRORS.items() for severity in SEVERITIES}


# --- classes --------------------------------------------------------------------------------------------------------


def timms(name):
    return files("timm.data").joinpath("_info", name).read_text().split()


def test_the_lists_of_classes_equal_timms():
    assert list(imagenet_wnids()) == timms("imagenet_synsets.txt")
    assert list(imagenet_wnids("a")) == timms("imagenet_a_synsets.txt")
    assert list(imagenet_wnids("r")) == timms("imagenet_r_synsets.txt")


def test_the_lists_are_sorted_and_the_small_ones_lie_in_the_large_one():
    lists = (imagenet_wnids(), imagenet_wnids("a"), imagenet_wnids("r"))
    assert [len(wnids) for wnids in lists] == [1000, 200, 200]
    for wnids in lists:
        assert list(wnids) == sorted(set(wnids))
        assert set(wnids) <= set(imagenet_wnids())


def test_the_lists_travel_in_the_wheel():
    setup, root = configparser.ConfigParser(), Path(mimae.__file__).parent
    setup.read(root / "setup.cfg")
    pattern = setup["options.package_data"]["mimae.evaluation"]
    assert len(list((root / "evaluation").glob(pattern))) == 3


@pytest.mark.parametrize("variant", ["a", "r"])
def test_the_restriction_equals_timms_whatever_the_labels_are_called(variant):
    expected = list(map(int, timms(f"imagenet_{variant}_indices.txt")))
    for names in (imagenet_wnids(), [f"LABEL_{index}" for index in range(1000)]):
        assert class_positions(imagenet_wnids(variant), names) == expected


def test_labels_are_found_by_name_in_any_order():
    shuffled = [imagenet_wnids()[index] for index in np.random.default_rng(0).permutation(1000)]
    positions = class_positions(imagenet_wnids("a"), shuffled)
    assert [shuffled[position] for position in positions] == list(imagenet_wnids("a"))
    assert class_positions(["dog", "cat"], ["cat", "bird", "dog"]) == [2, 0]
    # labels of a set that lacks some of the 200 classes
    assert class_positions(imagenet_wnids("a")[3::7], imagenet_wnids("a")) == list(range(3, 200, 7))


class Classifier(torch.nn.Module):
    """The mean colours of an image, through 1,000 random directions."""

    def __init__(self):
        super().__init__()
        self.classifier = torch.nn.Linear(3, 1000)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.classifier(pixel_values.mean((2, 3))))


def test_a_restricted_classifier_chooses_the_best_of_its_classes():
    model, images = Classifier(), torch.randn(8, 3, 4, 4)
    restricted = RestrictedClassifier(model, class_positions(imagenet_wnids("r"), imagenet_wnids()))
    logits = model(images).logits.tolist()
    best = [max(imagenet_wnids("r"), key=lambda wnid: row[imagenet_wnids().index(wnid)]) for row in logits]
    assert [imagenet_wnids("r")[index] for index in restricted(images).logits.argmax(1)] == best
    assert restricted.state_dict().keys() == {"model.classifier.weight", "model.classifier.bias"}


def test_the_loss_of_a_restricted_classifier_is_that_of_its_classes():
    model, images = Classifier(), torch.randn(3, 3, 4, 4)
    output = RestrictedClassifier(model, [7, 3])(images, labels=torch.tensor([0, 1, -100]))
    first, second = (row - row.logsumexp(0) for row in model(images).logits[:2, [7, 3]])
    torch.testing.assert_close(output.loss, -(first[0] + second[1]) / 2)
    assert RestrictedClassifier(model, [7, 3])(images).loss is None


def test_classes_that_a_model_does_not_have_are_named():
    with pytest.raises(ValueError, match=r"200 of 200 classes.*10 labels \(0, 1, 2 and 7 more\): n01498041, .* more"):
        class_positions(imagenet_wnids("a"), [str(digit) for digit in range(10)])
    with pytest.raises(
        ValueError, match=r"1 of 2 classes of the images are not among the 2 labels \(cat, dog\): bird"
    ):
        class_positions(["cat", "bird"], ["cat", "dog"])
    # a thousand names that are wnids, but not all of ImageNet-1k's, are not taken by position
    with pytest.raises(ValueError, match=r"1 of 200 classes.*n01498041"):
        class_positions(imagenet_wnids("a"), ["x" if name == "n01498041" else name for name in imagenet_wnids()])
    with pytest.raises(ValueError, match="more than one label with the name crane"):
        class_positions(["crane"], ["crane", "ox", "crane"])
    with pytest.raises(ValueError, match="2 of 2 classes"):
        class_positions(["cat", "dog"], [f"LABEL_{index}" for index in range(1000)])


# --- ImageNet-C -----------------------------------------------------------------------------------------------------


def make_imagenet_c(root, archive=lambda number: ""):
    for number, name in enumerate(CORRUPTIONS):
        for severity in SEVERITIES:
            (root / archive(number) / name / str(severity) / "n01440764").mkdir(parents=True)
    return root


def archive_of(number):
    """Three kinds of noise, four of blur, four of weather, the rest digital."""
    return ARCHIVES[sum(number >= first for first in (3, 7, 11))]


@pytest.mark.parametrize("archive", [lambda number: "", archive_of], ids=["flat", "archives"])
def test_both_layouts_of_imagenet_c_are_read(tmp_path, archive):
    make_imagenet_c(tmp_path, archive)
    (tmp_path / "extra" / "saturate" / "1" / "n01440764").mkdir(parents=True)
    folders = corruption_folders(tmp_path)
    assert list(folders) == [(name, severity) for name in CORRUPTIONS for severity in (1, 2, 3, 4, 5)]
    for number, name in enumerate(CORRUPTIONS):
        assert folders[name, 4] == tmp_path / archive(number) / name / "4"


def test_a_folder_that_is_no_imagenet_c_is_refused_with_what_was_found(tmp_path):
    with pytest.raises(ValueError, match=r"none is not a folder.*expected <corruption>/<severity>/<class>"):
        corruption_folders(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no ImageNet-C: expected .*, found nothing"):
        corruption_folders(tmp_path)
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"no ImageNet-C: expected .*, found train, val"):
        corruption_folders(tmp_path)


def test_what_an_imagenet_c_lacks_is_named(tmp_path):
    make_imagenet_c(tmp_path, archive_of)
    (tmp_path / "weather" / "fog").rename(tmp_path / "weather" / "mist")
    (tmp_path / "noise" / "shot_noise" / "3" / "n01440764").rmdir()
    with pytest.raises(ValueError, match=r"no images of fog, shot_noise/3:"):
        corruption_folders(tmp_path)


def test_the_table_of_alexnets_own_errors_says_exactly_100():
    table = corruption_table(ALEXNET, relative_to_alexnet=True)
    assert table["mce"] == 100
    assert all(entry["relative_error"] == 100 for entry in table["per_corruption"].values())
    # the mean of the 15 published numbers, added up by hand
    assert table["mean_error"] == pytest.approx(11.834896 / 15)
    assert table["severities"] == [1, 2, 3, 4, 5]
    assert list(table["per_corruption"]) == list(CORRUPTIONS)
    assert json.loads(json.dumps(table)) == table


def test_a_table_equals_hand_computed_values():
    errors = {("fog", 3): 0.3, ("fog", 1): 0.1, ("snow", 1): 0.2, ("snow", 3): 0.6}
    table = corruption_table(errors)
    assert table == {
        "severities": [1, 3],
        "per_corruption": {
            "snow": {"error": pytest.approx(0.4), "error_by_severity": [0.2, 0.6]},
            "fog": {"error": pytest.approx(0.2), "error_by_severity": [0.1, 0.3]},
        },
        "mean_error": pytest.approx(0.3),
    }
    assert corruption_markdown(table).splitlines() == [
        "| error in % | severity 1 | severity 3 | mean |",
        "| --- | ---: | ---: | ---: |",
        "| snow | 20.0 | 60.0 | 40.0 |",
        "| fog | 10.0 | 30.0 | 20.0 |",
        "| **mean** | **15.0** | **45.0** | **30.0** |",
    ]


def test_markdown_has_a_column_of_alexnets_where_it_was_asked_for():
    halved = {key: error / 2 for key, error in ALEXNET.items()}
    lines = corruption_markdown(corruption_table(halved, relative_to_alexnet=True)).splitlines()
    assert lines[0].endswith("| mean | % of AlexNet's |")
    assert lines[2] == "| gaussian noise | 44.3 | 44.3 | 44.3 | 44.3 | 44.3 | 44.3 | 50.0 |"
    assert lines[-1].endswith("| **50.0** |")
    assert len(lines) == 2 + 15 + 1


def test_errors_that_make_no_table_are_refused_by_name():
    with pytest.raises(ValueError, match="without fog/2"):
        corruption_table({("fog", 1): 0.1, ("snow", 1): 0.1, ("snow", 2): 0.1})
    with pytest.raises(ValueError, match="without fog/2, fog/3, fog/4, fog/5"):
        corruption_table({("fog", 1): 0.1}, relative_to_alexnet=True)
    with pytest.raises(ValueError, match=r"gaussian_noise, .* are missing"):
        corruption_table({("fog", severity): 0.1 for severity in SEVERITIES}, relative_to_alexnet=True)
    with pytest.raises(ValueError, match=r"unknown corruptions \['rain'\]"):
        corruption_table({("rain", 1): 0.1})
    with pytest.raises(ValueError, match="without errors"):
        corruption_table({})


# --- on the fly -----------------------------------------------------------------------------------------------------

PHOTOGRAPH = torch.from_numpy(photographs.chelsea()).permute(2, 0, 1)[:, :, 75:375]  # (3, 300, 300), a cat
SIZE = 64
CLEAN = evaluation_transform(SIZE)(PHOTOGRAPH)


def squared_difference(image, other=CLEAN):
    return float((image.float() - other.float()).square().mean())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_changes_a_photograph_more_at_severity_5_than_at_1(name):
    differences = []
    for severity in SEVERITIES:
        image = CorruptedTransform(SIZE, name, severity)(PHOTOGRAPH)
        assert (image.dtype, image.shape) == (torch.uint8, CLEAN.shape)
        assert image.is_contiguous()
        differences.append(squared_difference(image))
    assert min(differences) > 1
    assert differences[4] > differences[0]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_depends_on_image_and_seed_alone_and_leaves_random_states_alone(name):
    transform = CorruptedTransform(SIZE, name, 3, seed=7)
    expected = transform(PHOTOGRAPH)
    np.random.seed(5)
    states = (np.random.get_state()[1].copy(), torch.get_rng_state())
    assert torch.equal(pickle.loads(pickle.dumps(transform))(PHOTOGRAPH.clone()), expected)
    assert np.array_equal(np.random.get_state()[1], states[0])
    assert torch.equal(torch.get_rng_state(), states[1])
    is_random = name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert torch.equal(CorruptedTransform(SIZE, name, 3, seed=8)(PHOTOGRAPH), expected) != is_random


def test_two_images_get_different_noise():
    grey, lighter = (torch.full((3, SIZE, SIZE), level, dtype=torch.uint8) for level in (120, 121))
    transform = CorruptedTransform(SIZE, "gaussian_noise", 1)
    noise, other = (transform(image).float() - image for image in (grey, lighter))
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1])) < 0.1
    assert noise.std() == pytest.approx(0.08 * 255, rel=0.05)  # the published strength


def test_workers_corrupt_as_their_parent_does():
    images = [PHOTOGRAPH[:, start : start + 200] for start in (0, 40, 80, 100)]
    for name in ("glass_blur", "frost", "defocus_blur"):
        transform = CorruptedTransform(SIZE, name, 2)
        expected = list(map(transform, images))
        loader = DataLoader([0, 1, 2, 3], batch_size=None, num_workers=2, collate_fn=_Corrupt(images, transform))
        assert all(map(torch.equal, loader, expected))


class _Corrupt:
    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __call__(self, index):
        return self.transform(self.images[index])


def test_the_protocol_is_resize_crop_corrupt():
    jpeg = io.BytesIO()
    clean = evaluation_transform(224)(PHOTOGRAPH)
    Image.fromarray(clean.permute(1, 2, 0).numpy()).save(jpeg, "JPEG", quality=7)  # the published severity 5
    expected = torch.from_numpy(np.array(Image.open(jpeg))).permute(2, 0, 1)
    assert torch.equal(CorruptedTransform(224, "jpeg_compression", 5)(PHOTOGRAPH), expected)
    whole = CorruptedTransform(224, "contrast", 1, crop_ratio=1)(PHOTOGRAPH)
    clean = evaluation_transform(224, crop_ratio=1)(PHOTOGRAPH).float()
    mean = clean.mean((1, 2), keepdim=True)
    assert (whole.float() - (mean + 0.4 * (clean - mean))).abs().max() <= 1


@pytest.mark.parametrize("size", [8, 16, (16, 24), (20, 48)])
@pytest.mark.parametrize("name", ["zoom_blur", "snow", "elastic_transform", "pixelate"])
def test_models_of_small_images_get_theirs(size, name):
    height, width = (size, size) if isinstance(size, int) else size
    image = CorruptedTransform(size, name, 5)(PHOTOGRAPH)
    assert image.shape == (3, height, width)
    assert squared_difference(image, evaluation_transform(size)(PHOTOGRAPH)) > 1


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_grey_image_is_the_luma_of_its_corrupted_rgb(name):
    grey = PHOTOGRAPH[1:2]
    transform = CorruptedTransform(32, name, 4)
    image = transform(grey)
    assert (image.shape, image.dtype) == ((1, 32, 32), torch.uint8)
    rgb = transform(grey.expand(3, -1, -1))
    luma = np.array(Image.fromarray(rgb.permute(1, 2, 0).numpy()).convert("L")).astype(int)
    assert np.abs(image[0].numpy() - luma).max() <= 1


def test_what_cannot_be_corrupted_is_refused():
    with pytest.raises(ValueError, match="4 channels"):
        CorruptedTransform(32, "fog", 1)(torch.zeros(4, 40, 40, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"no corruption 'rain' of severity 1: there are .*gaussian_noise"):
        CorruptedTransform(32, "rain", 1)
    for severity in (0, 6):
        with pytest.raises(ValueError, match=f"severity {severity}"):
            CorruptedTransform(32, "fog", severity)


def test_a_missing_library_is_told_with_its_remedy_before_any_image_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"pip install 'mimae\[robustness\]'"):
        CorruptedTransform(32, "fog", 1)
