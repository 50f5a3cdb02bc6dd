"""run_object_detection.py: its metrics, images without objects, and two processes."""

import json
from pathlib import Path

import pytest
import torch
from dense_runs import (
    SCENE_SIZE,
    compose,
    copied,
    edit_annotations,
    flags,
    normalised,
    places,
    run,
    save_encoder,
)
from forking import run_forked
from runs import ROOT, metrics, series

from mimae.dense.mask_rcnn import MaskRCNNForInstanceSegmentation
from mimae.evaluation.detection import detection_metrics, detection_records, restore_detections

PARTS = ("rpn_objectness_loss", "rpn_box_loss", "box_class_loss", "box_regression_loss", "mask_loss")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return compose(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def metrics_anew(images: Path, folder: Path) -> dict[str, float]:
    """Of the model in a folder, on all validation images."""
    model, records = MaskRCNNForInstanceSegmentation.from_pretrained(folder).eval(), []
    size = (SCENE_SIZE, SCENE_SIZE)
    for image_id, path in enumerate(sorted((images / "images" / "validation").iterdir()), start=1):
        with torch.no_grad():
            (detections,) = model(normalised(path)[None]).detections
        restored = restore_detections(detections, image_size=size, original_size=size)
        records += detection_records(restored, image_id=image_id, category_ids=range(1, 11))
    return detection_metrics(places("detection", images)["validation_annotation_file"], records)


def without_objects(content: dict, image_ids: set[int]) -> None:
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] not in image_ids]


def test_the_metrics_in_the_results_are_those_of_the_saved_model(images, encoder, tmp_path):
    results = run("detection", images, encoder, tmp_path, max_train_steps=8, evaluation_steps=8)
    assert results["metrics"]["box_ar100"] > 0  # or equality would say little
    assert results["metrics"] == pytest.approx(metrics_anew(images, tmp_path), abs=1e-6)
    for line in (line for line in metrics(tmp_path) if "loss" in line):
        assert line["loss"] == pytest.approx(sum(line[name] for name in PARTS), rel=1e-4)


@pytest.mark.extended
def test_two_processes_train_together_where_one_sees_no_object_and_count_each_image_once(images, encoder, tmp_path):
    folder = copied(images, tmp_path / "scenes")
    edit_annotations(folder, "train", lambda content: without_objects(content, {1, 2, 3, 4}))
    values = {"per_device_train_batch_size": 1, "keep_empty_images": True, "evaluation_steps": 4}
    argv = flags("detection", folder, encoder, tmp_path / "run", **values)
    result = run_forked(ROOT / "run_object_detection.py", argv, num_processes=2)
    assert result.returncode == 0, result.output[-4000:]
    assert "world size 2" in result.output
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["hardware"]["processes"] == 2
    assert results["training_images"] == 8
    assert results["test_images"] == 3
    assert results["metrics"] == pytest.approx(metrics_anew(folder, tmp_path / "run"), abs=1e-6)


def test_images_without_objects_are_trained_on_only_if_asked_for(images, encoder, tmp_path):
    folder = copied(images, tmp_path / "scenes")
    edit_annotations(folder, "train", lambda content: without_objects(content, {1, 2, 3, 4, 5, 6}))
    results = run("detection", folder, encoder, tmp_path / "without", max_train_steps=1)
    assert results["training_images"] == 2
    results = run("detection", folder, encoder, tmp_path / "with", keep_empty_images=True)
    assert results["training_images"] == 8
    assert all(0 < loss < 20 for loss in series(tmp_path / "with", "loss").values())


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_without_any_object_is_refused_before_training(split, images, encoder, tmp_path):
    folder = copied(images, tmp_path / "scenes")
    edit_annotations(folder, split, lambda content: without_objects(content, set(range(1, 9))))
    with pytest.raises(ValueError, match=rf"instances_{split}\.json has no object that can be used"):
        run("detection", folder, encoder, tmp_path / "run", keep_empty_images=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_annotation_of_a_class_outside_the_list_is_named(images, encoder, tmp_path):
    folder = copied(images, tmp_path / "scenes")
    edit_annotations(folder, "train", lambda content: content["annotations"][0].update(category_id=99))
    with pytest.raises(ValueError, match="annotation 1 has category_id 99, which the file does not list"):
        run("detection", folder, encoder, tmp_path / "run")


def test_the_learning_rate_falls_at_its_milestones(images, encoder, tmp_path):
    run("detection", images, encoder, tmp_path, lr_milestones=[2, 3], warmup_steps=1, layer_decay=1.0)
    assert series(tmp_path, "learning_rate") == pytest.approx({1: 0, 2: 1e-3, 3: 1e-4, 4: 1e-5})
