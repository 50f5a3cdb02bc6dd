"""run_semantic_segmentation.py: its metrics, its losses, and two processes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from dense_runs import CROP_SIZE, SCENE_SIZE, compose, copied, flags, launch, normalised, run, save_encoder
from PIL import Image
from runs import series
from sklearn.metrics import jaccard_score
from transformers import UperNetForSemanticSegmentation

from mimae.flags.option import RecipeError

STRIDE = 21  # 2/3 of the crop


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return compose(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def metrics_by_hand(images: Path, folder: Path) -> dict[str, float]:
    """Of the model in a folder, on all validation images, with windows that slide."""
    model = UperNetForSemanticSegmentation.from_pretrained(folder).eval()
    truths, predictions = [], []
    for path in sorted((images / "images" / "validation").iterdir()):
        pixels, votes = normalised(path), torch.zeros(11, SCENE_SIZE, SCENE_SIZE)
        counts = torch.zeros(SCENE_SIZE, SCENE_SIZE)
        starts = (0, SCENE_SIZE - CROP_SIZE)  # 21 would reach past the edge
        for top in starts:
            for left in starts:
                window = (..., slice(top, top + CROP_SIZE), slice(left, left + CROP_SIZE))
                with torch.no_grad():
                    votes[window] += model(pixels[window][None]).logits[0]
                counts[window] += 1
        predictions.append((votes / counts).argmax(0).numpy())
        truths.append(np.array(Image.open(images / "masks" / "validation" / f"{path.stem}.png")))
    truth, prediction = np.stack(truths).ravel(), np.stack(predictions).ravel()
    occurring = sorted(set(truth) | set(prediction))
    return {
        "mean_iou": jaccard_score(truth, prediction, labels=occurring, average="macro"),
        "overall_accuracy": float((truth == prediction).mean()),
    }


def test_the_metrics_in_the_results_are_those_of_the_saved_model_by_hand(images, encoder, tmp_path):
    results = run("segmentation", images, encoder, tmp_path, learning_rate=1e-2)
    expected = metrics_by_hand(images, tmp_path)
    assert results["metrics"]["mean_iou"] > 0
    for name, value in expected.items():
        assert results["metrics"][name] == pytest.approx(value, abs=1e-4), name
    assert list(results["per_class"]) == ["background", *"0123456789"]


def test_two_processes_train_and_count_as_one_does(images, encoder, tmp_path):
    # one that accumulates has the batches, and with them the batch statistics, of two that do not
    values = {"drop_path_rate": 0.0, "learning_rate": 1e-2, "evaluation_steps": 4}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    result = launch("segmentation", flags("segmentation", images, encoder, tmp_path / "two", **values), *launcher)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "world size 2" in result.stderr
    run("segmentation", images, encoder, tmp_path / "one", gradient_accumulation_steps=2, **values)
    for name in ("loss", "grad_norm"):
        one, two = series(tmp_path / "one", name), series(tmp_path / "two", name)
        assert two == pytest.approx(one, rel=1e-3), name
    # an image that were counted twice, or left out, would show
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert results["hardware"]["processes"] == 2
    assert results["test_images"] == 3
    for name, value in metrics_by_hand(images, tmp_path / "two").items():
        assert results["metrics"][name] == pytest.approx(value, abs=1e-4), name


def test_images_without_a_single_class_train_with_a_loss_of_zero(images, encoder, tmp_path):
    folder = copied(images, tmp_path / "scenes")
    for path in (folder / "masks" / "train").iterdir():
        Image.new("L", (SCENE_SIZE, SCENE_SIZE), 255).save(path)
    results = run("segmentation", folder, encoder, tmp_path / "run")
    assert set(series(tmp_path / "run", "loss").values()) == {0.0}
    assert all(math.isfinite(value) for value in results["metrics"].values())


def test_a_training_mask_with_a_class_outside_the_list_is_named(images, encoder, tmp_path):
    folder = copied(images, tmp_path / "scenes")
    Image.new("L", (SCENE_SIZE, SCENE_SIZE), 77).save(folder / "masks" / "train" / "000002.png")
    with pytest.raises(ValueError, match=r"000002\.png\) has a pixel of value 77, .* --num_classes"):
        run("segmentation", folder, encoder, tmp_path / "run")


def test_parquet_files_are_trained_on_and_others_tested(images, encoder, tmp_path):
    features = Features({"image": ImageFeature(), "label": ImageFeature()})
    files = {}
    for split in ("train", "validation"):
        columns = {
            name: [str(path) for path in sorted((images / folder / split).iterdir())]
            for name, folder in (("image", "images"), ("label", "masks"))
        }
        files[split] = tmp_path / f"{split}.parquet"
        Dataset.from_dict(columns, features=features).to_parquet(files[split])
    values = {"train_dir": None, "data_files": files["train"], "num_classes": 11, "cache_dir": tmp_path / "cache"}
    with pytest.raises(RecipeError, match="data_files and validation_files go together"):
        run("segmentation", images, encoder, tmp_path / "run", **values)
    values["validation_files"] = files["validation"]
    results = run("segmentation", images, encoder, tmp_path / "run", max_train_steps=1, **values)
    assert (results["training_images"], results["test_images"]) == (8, 3)


def test_value_zero_may_stand_for_no_class(images, encoder, tmp_path):
    results = run("segmentation", images, encoder, tmp_path, reduce_zero_label=True, max_train_steps=1)
    assert list(results["per_class"]) == list("0123456789")
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["do_reduce_labels"] is True
