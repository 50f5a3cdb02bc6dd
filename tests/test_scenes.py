"""The composed scenes: the same for one seed, and annotations that say what the pixels show."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimae.data.scenes import LEAST_VISIBLE, MOST_OBJECTS, SceneComposer, main, photographs, run_lengths
from mimae.data.sources.opening import open_image_source

COUNTS = ("--pretrain_images", "2", "--train_images", "6", "--validation_images", "3", "--scene_size", "48")


def compose(folder: Path, *flags: str) -> Path:
    main(["--output_dir", str(folder), *COUNTS, *flags])
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return compose(tmp_path_factory.mktemp("scenes"))


def annotations_of(folder: Path, split: str) -> dict:
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def visible_pixels(annotation: dict) -> np.ndarray:
    """A mask from its runs, by the letter of COCO's definition."""
    height, width = annotation["segmentation"]["size"]
    values = np.zeros(height * width, dtype=bool)
    position, value = 0, False
    for length in annotation["segmentation"]["counts"]:
        values[position : position + length] = value
        position, value = position + length, not value
    assert position == height * width
    return values.reshape(width, height).T


def test_one_seed_gives_one_set_and_another_seed_another(scenes, tmp_path):
    files = sorted(path.relative_to(scenes) for path in scenes.rglob("*.*"))
    again, other = compose(tmp_path / "again"), compose(tmp_path / "other", "--seed", "1")
    assert len(files) == 2 * 11 + 3
    assert all((again / name).read_bytes() == (scenes / name).read_bytes() for name in files)
    assert all((other / name).read_bytes() != (scenes / name).read_bytes() for name in files if name.suffix == ".jpg")


def test_a_scene_is_the_same_however_many_are_composed(scenes, tmp_path):
    main(["--output_dir", str(tmp_path), *COUNTS[:2], "--train_images", "2", *COUNTS[4:]])
    name = "images/train/000001.jpg"
    assert (tmp_path / name).read_bytes() == (scenes / name).read_bytes()


@pytest.mark.parametrize("split", ["pretrain", "train", "validation"])
def test_masks_boxes_and_runs_tell_the_same(scenes, split):
    content = annotations_of(scenes, split)
    assert len({annotation["id"] for annotation in content["annotations"]}) == len(content["annotations"])
    for image in content["images"]:
        classes = np.array(Image.open(scenes / "masks" / split / image["file_name"].replace(".jpg", ".png")))
        assert classes.shape == (image["height"], image["width"])
        assert Image.open(scenes / "images" / split / image["file_name"]).mode == "L"
        drawn = np.zeros_like(classes)
        objects = [each for each in content["annotations"] if each["image_id"] == image["id"]]
        assert 1 <= len(objects) <= MOST_OBJECTS
        for annotation in objects:
            visible = visible_pixels(annotation)
            assert visible.sum() == annotation["area"] > 0
            assert not drawn[visible].any(), "visible parts do not overlap"
            drawn[visible] = annotation["category_id"]
            left, top, width, height = annotation["bbox"]
            rows, columns = np.nonzero(visible)
            assert (columns.min(), rows.min()) == (left, top)
            assert (columns.max() - left + 1, rows.max() - top + 1) == (width, height)
        assert np.array_equal(drawn, classes)


def test_no_object_is_hidden_beyond_the_limit():
    digits = open_image_source(split="train")
    composer = SceneComposer(digits, photographs(held_out=False), scene_size=48, seed=3, stream=0)
    parts = [each.visible.sum() / each.num_pixels for index in range(40) for each in composer(index)[1]]
    assert min(parts) >= LEAST_VISIBLE
    assert min(parts) < 1, "some stand before others"


def test_runs_of_a_mask_by_hand():
    mask = np.array([[0, 1, 1], [1, 1, 0]], dtype=bool)  # down the columns: 0 1, 1 1, 1 0
    assert run_lengths(mask) == [1, 4, 1]
    assert run_lengths(~mask) == [0, 1, 4, 1]
    assert run_lengths(np.zeros((2, 2), dtype=bool)) == [4]


def test_held_out_scenes_stand_before_another_part_of_the_photographs():
    for training, held_out in zip(photographs(held_out=False), photographs(held_out=True), strict=True):
        assert training.shape[1] + held_out.shape[1] == 640
        assert training.shape[1] == 426


def test_a_folder_that_holds_a_set_is_refused(scenes):
    with pytest.raises(ValueError, match="holds images, masks, annotations already"):
        compose(scenes)


def test_there_must_be_a_name_for_each_class(tmp_path):
    with pytest.raises(ValueError, match="gives 2 names to 10 classes"):
        compose(tmp_path, "--class_names", "a", "b")


def test_classes_have_the_names_that_are_given(tmp_path):
    names = [f"digit-{number}" for number in range(10)]
    content = annotations_of(compose(tmp_path, "--class_names", *names), "train")
    assert [category["name"] for category in content["categories"]] == names
    assert [category["id"] for category in content["categories"]] == list(range(1, 11))
