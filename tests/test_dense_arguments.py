"""Flags of the dense tasks: defaults that are the papers', what follows from what, and values refused by name."""

from pathlib import Path

import pytest

from mimae.families.registry import CONFIG_CLASSES
from mimae.flags.dense import (
    DetectionArguments,
    DetectionDataArguments,
    SegmentationArguments,
    SegmentationDataArguments,
)
from mimae.flags.option import RecipeError
from mimae.flags.recipes import parse_arguments
from mimae.flags.scripts import DETECTION, SEGMENTATION


def parse(argv: list[str], groups: tuple[type, ...], recipe: Path):
    return parse_arguments(argv, groups, CONFIG_CLASSES, default_recipe=recipe, description="")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults_are_those_of_ade20k_and_coco():
    args = SegmentationArguments()
    assert (args.learning_rate, args.layer_decay, args.weight_decay, args.warmup_steps) == (1e-4, 0.65, 0.05, 1500)
    assert (args.crop_size, args.short_side, args.stride) == (512, 512, 341)
    args = DetectionArguments()
    assert (args.learning_rate, args.layer_decay, args.weight_decay, args.warmup_steps) == (1e-4, 0.7, 0.1, 250)


def test_short_side_and_stride_follow_the_crop_unless_they_are_set():
    args = SegmentationArguments(crop_size=96)
    assert (args.short_side, args.stride) == (96, 64)
    args = SegmentationArguments(crop_size=96, short_side=128, stride=48)
    assert (args.short_side, args.stride) == (128, 48)


@pytest.mark.parametrize("groups", [SEGMENTATION, DETECTION])
def test_no_flag_has_two_meanings_and_help_is_printed(groups, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"], groups, write(tmp_path / "recipe.yaml", "{}"))
    assert end.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--learning_rate", "--image_size", "--window_size", "--add_fpn", "--drop_path_rate"):
        assert flag in text
    assert "--evaluation_crop_ratio" not in text


def test_recipe_and_flags_are_read_with_those_of_the_model(tmp_path):
    recipe = write(tmp_path / "recipe.yaml", "image_size: 1024\nlr_milestones: [163889, 177546]\nwindow_size: 14\n")
    (_, data_args, args, _), fields, _ = parse(
        ["--train_annotation_file", "a.json", "--train_image_dir", "a", "--seed", "3"], DETECTION, recipe
    )
    assert fields == {"image_size": 1024, "window_size": 14}
    assert (args.lr_milestones, args.seed, data_args.train_annotation_file) == ([163889, 177546], 3, "a.json")


def test_a_flag_that_says_where_images_are_replaces_all_that_the_recipe_says_of_its_own(tmp_path):
    recipe = write(tmp_path / "recipe.yaml", "dataset_name: a/b\nreduce_zero_label: true\nnum_classes: 150\n")
    (_, data_args, _, _), _, _ = parse(["--train_dir", "here"], SEGMENTATION, recipe)
    assert (data_args.train_dir, data_args.dataset_name) == ("here", None)
    assert (data_args.reduce_zero_label, data_args.num_classes) == (False, None)


@pytest.mark.parametrize(
    ("group", "values", "words"),
    [
        (SegmentationArguments, {"crop_size": 0}, "crop_size=0 must be at least 1"),
        (SegmentationArguments, {"stride": 513}, "stride=513 is above crop_size=512"),
        (SegmentationArguments, {"short_side": 4096}, "long_side_limit=2048 is below short_side=4096"),
        (
            SegmentationArguments,
            {"min_scale": 3.0},
            r"min_scale=3.0 and max_scale=2.0 must be positive, the smaller first",
        ),
        (SegmentationArguments, {"min_scale": 0.0}, "min_scale=0.0 and max_scale=2.0 must be positive"),
        (SegmentationArguments, {"poly_power": 0.0}, "poly_power=0.0 must be positive"),
        (SegmentationArguments, {"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        (SegmentationArguments, {"warmup_steps": -1}, "warmup_steps=-1 must be 0 or more"),
        (SegmentationArguments, {"layer_decay": 1.5}, "layer_decay=1.5 must be above 0 and at most 1"),
        (SegmentationDataArguments, {"num_classes": 1}, "num_classes=1 must be at least 2"),
        (SegmentationDataArguments, {"train_dir": "a", "dataset_name": "b"}, "train_dir and dataset_name name"),
        (SegmentationDataArguments, {"max_bad_image_fraction": 1.5}, "max_bad_image_fraction=1.5 must be in 0..1"),
        (DetectionArguments, {"lr_milestones": [5, 5]}, r"lr_milestones=\[5, 5\] must be positive and ascending"),
        (DetectionArguments, {"lr_milestones": []}, r"lr_milestones=\[\] must be positive and ascending"),
        (DetectionArguments, {"score_threshold": 1.0}, "score_threshold=1.0 must be in 0..1, below 1"),
        (DetectionDataArguments, {"train_image_dir": "a"}, "train_annotation_file and train_image_dir go together"),
        (DetectionDataArguments, {"dataloader_num_workers": -1}, "dataloader_num_workers=-1 must be 0 or more"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(group, values, words):
    with pytest.raises(RecipeError, match=words):
        group(**values)


def test_wrong_types_are_refused_by_name():
    with pytest.raises(TypeError, match="lr_milestones"):
        DetectionArguments(lr_milestones=[1.5])
