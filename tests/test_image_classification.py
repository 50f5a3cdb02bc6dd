"""run_image_classification.py, task by task, on tiny models: what it leaves, resumes, counts and refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from drawing import drawn
from forking import run_forked, start_forked
from loopback_hub import Account, LoopbackHub
from PIL import Image
from runs import ROOT, TINY_MODEL, pretrain, write_shards
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from mimae import MIMAEConfig, MIMAEForImageClassification
from mimae.data.sources.opening import open_digits
from mimae.evaluation.robustness import CORRUPTIONS, imagenet_wnids
from mimae.families.warm_start import Checkpoint, UnfitCheckpointError
from mimae.flags.option import RecipeError
from mimae.flags.recipes import as_argv
from mimae.run_image_classification import RECIPES, default_recipe, main
from mimae.training.bad_images import TooManyBadImagesError

SCRIPT = ROOT / "run_image_classification.py"
TOKEN = "hf_" + "Secret" * 6
SHORT = {
    "cpu_threads": 1,
    "per_device_train_batch_size": 128,
    "evaluation_crop_ratio": 1.0,
    "report_to": "none",
    "logging_steps": 1,
    "warmup_epochs": 0,
}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A pre-training checkpoint of a few steps."""
    folder = tmp_path_factory.mktemp("runs") / "pretrained"
    assert pretrain(folder, max_train_steps=3, probe_samples=0) == 0
    return folder


@pytest.fixture(scope="module")
def classifier(pretrained) -> Path:
    """A fine-tuned one."""
    folder = pretrained.parent / "classifier"
    with drawn():
        run("finetune", pretrained, folder, max_train_steps=8)
    return folder


def flags(task: str, model, output_dir, *extra: str, **values) -> list[str]:
    values = {**SHORT, "model_name_or_path": model, "output_dir": output_dir, **values}
    recipe = str(RECIPES / "digits" / "finetune.yaml")
    return ["--config", recipe, "--use_cpu", "--task", task, *as_argv(values), *extra]


def run(task: str, model, output_dir, *extra: str, **values) -> dict:
    """Runs in this process and returns what results.json holds."""
    assert main(flags(task, model, output_dir, *extra, **values)) == 0
    return json.loads((Path(output_dir) / "results.json").read_text())


def logged(folder: Path, name: str) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def write_classes(folder: Path, classes: dict[str, int]) -> Path:
    """A folder with this many images, noise, for each class."""
    random = np.random.default_rng(0)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = random.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}_{index}.png")
    return folder


def test_help_is_printed_with_the_per_cent_signs_in_it(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "0.01 for 1 %" in " ".join(capsys.readouterr().out.split())


# --- the tasks ------------------------------------------------------------------------------------------------------


def test_fine_tuning_leaves_a_model_its_results_and_pictures(classifier):
    results = json.loads((classifier / "results.json").read_text())
    assert results["task"] == "finetune"
    assert results["seed"] == 0
    assert results["test_images"] == 360
    assert results["recipe"]["layer_decay"] == 0.75
    assert results["hardware"]["processes"] == 1
    assert set(results["metrics"]) == {"accuracy", "top5_accuracy", "loss"}
    assert results["metrics"]["accuracy"] * 360 == pytest.approx(round(results["metrics"]["accuracy"] * 360))
    assert logged(classifier, "eval_accuracy")[8] == results["metrics"]["accuracy"]
    for name in ("curves.png", "confusion_matrix.png", "features.png", "README.md", "preprocessor_config.json"):
        assert (classifier / name).exists(), name
    model = MIMAEForImageClassification.from_pretrained(classifier)
    assert list(model.config.id2label.values()) == list("0123456789")


def test_evaluating_a_fine_tuned_model_gives_what_fine_tuning_reported(classifier, tmp_path):
    expected = json.loads((classifier / "results.json").read_text())["metrics"]
    results = run("evaluate", classifier, tmp_path / "run")
    assert results["metrics"] == pytest.approx(expected, rel=1e-6)
    # and what scikit-learn's digits say by hand
    checkpoint = Checkpoint(str(classifier))
    model = checkpoint.load(MIMAEForImageClassification, checkpoint.config({})).eval()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert model.config.num_labels == len(load_digits().target_names)


def test_corrupted_images_are_tested_by_corruption_and_severity(classifier, tmp_path):
    results = run("evaluate", classifier, tmp_path / "run", corruptions=["pixelate"])
    table = results["robustness"]["corruptions"]
    assert list(table["per_corruption"]) == ["pixelate"]
    assert len(table["per_corruption"]["pixelate"]["error_by_severity"]) == 5
    assert "mce" not in table  # AlexNet's errors are of ImageNet-C


def test_a_probe_trains_all_learning_rates_and_keeps_the_best_as_a_classifier(pretrained, tmp_path):
    rates = [1.0, 100.0]
    results = run("linear_probe", pretrained, tmp_path / "run", max_train_steps=8, probe_learning_rates=rates)
    metrics = results["metrics"]
    by_rate = {rate: metrics[f"accuracy_lr_{rate:g}"] for rate in (0.5, 50.0)}  # base · 128 / 256
    assert metrics["accuracy"] == max(by_rate.values())
    assert by_rate[metrics["best_learning_rate"]] == metrics["accuracy"]

    again = run("evaluate", tmp_path / "run", tmp_path / "evaluated")
    assert again["metrics"]["accuracy"] == pytest.approx(metrics["accuracy"], abs=1 / 360)
    encoder = load_file(pretrained / "model.safetensors")
    kept = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(kept[name], encoder[name]) for name in kept if name.startswith("vit."))


def test_neighbours_vote_for_every_k_and_the_untrained_control_differs(pretrained, tmp_path):
    results = run("knn", pretrained, tmp_path / "trained", knn_k=[1, 20])
    control = run("knn", pretrained, tmp_path / "untrained", "--untrained", knn_k=[1, 20])
    assert {"accuracy_k_1", "accuracy_k_20"} <= set(results["metrics"])
    assert control["untrained"] is True
    assert control["metrics"] != results["metrics"]


def test_a_seed_fixes_the_result_bit_for_bit(classifier, pretrained, tmp_path):
    run("finetune", pretrained, tmp_path / "again", max_train_steps=8, dataloader_num_workers=2)
    first, second = (load_file(folder / "model.safetensors") for folder in (classifier, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_resumed_fine_tuning_equals_an_uninterrupted_one(classifier, pretrained, tmp_path):
    # 11 steps an epoch; the schedule is that of 8 steps in both
    folder = tmp_path / "run"
    run("finetune", pretrained, folder, max_train_steps=8, checkpointing_steps=3)
    for name in ("model.safetensors", "results.json"):
        (folder / name).unlink()
    run("finetune", pretrained, folder, "--resume_from_checkpoint", str(folder / "checkpoint-3"), max_train_steps=8)
    first, second = (load_file(path / "model.safetensors") for path in (classifier, folder))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert logged(folder, "loss") == logged(classifier, "loss")


@pytest.mark.extended
def test_streamed_shards_train_as_the_same_rows_converted(pretrained, tmp_path):
    files = write_shards(tmp_path / "shards")
    one = {"data_files": [files], "validation_files": [files], "max_train_steps": 4, "shuffle_window": 10_000}
    run("finetune", pretrained, tmp_path / "streamed", "--streaming", **one)
    results = run("finetune", pretrained, tmp_path / "low", "--streaming", train_fraction=0.2, **one)
    assert results["test_images"] == 1797
    assert logged(tmp_path / "streamed", "loss").keys() == {1, 2, 3, 4}


def test_low_shot_training_takes_a_fraction_of_each_class(pretrained, tmp_path):
    results = run("knn", pretrained, tmp_path / "run", train_fraction=0.1)
    counts = np.bincount(open_digits("train").labels())
    assert results["training_images"] == sum(max(1, round(0.1 * count)) for count in counts)
    assert results["recipe"]["train_fraction"] == 0.1


def test_averaged_weights_are_what_is_tested_and_kept(pretrained, classifier, tmp_path):
    run("finetune", pretrained, tmp_path / "run", max_train_steps=8, ema_decay=0.9)
    averaged, plain = (load_file(path / "model.safetensors") for path in (tmp_path / "run", classifier))
    assert not torch.equal(averaged["classifier.weight"], plain["classifier.weight"])
    expected = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["accuracy"]
    assert run("evaluate", tmp_path / "run", tmp_path / "test")["metrics"]["accuracy"] == pytest.approx(expected)


# --- ImageNet's offspring, with images of noise ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet_classifier(tmp_path_factory) -> Path:
    """A random model with ImageNet's 1,000 labels, in words as on the Hub."""
    folder = tmp_path_factory.mktemp("imagenet") / "model"
    words = {"id2label": {i: f"class number {i}" for i in range(1000)}}
    words["label2id"] = {name: i for i, name in words["id2label"].items()}
    torch.manual_seed(0)
    model = MIMAEForImageClassification(MIMAEConfig(**TINY_MODEL, **words))
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    return folder


def test_imagenet_a_is_judged_among_its_200_classes(imagenet_classifier, tmp_path):
    wnids = imagenet_wnids("a")[:3]
    images = write_classes(tmp_path / "a", dict.fromkeys(wnids, 4))
    results = run("evaluate", imagenet_classifier, tmp_path / "run", validation_dir=images, imagenet_a_dir=images)
    model = MIMAEForImageClassification.from_pretrained(imagenet_classifier).eval()
    allowed = [imagenet_wnids().index(wnid) for wnid in imagenet_wnids("a")]
    hits = {"all": [], "restricted": []}
    for wnid in wnids:
        for path in sorted((images / wnid).iterdir()):
            pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
            pixels = torch.nn.functional.interpolate(pixels[None].float(), 16, mode="bicubic", antialias=True)
            pixels = pixels.round().clamp(0, 255) / 255
            mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
            with torch.no_grad():
                logits = model((pixels - mean) / std).logits[0]
            label = imagenet_wnids().index(wnid)
            hits["all"].append(int(logits.argmax()) == label)
            hits["restricted"].append(allowed[int(logits[allowed].argmax())] == label)
    assert results["metrics"]["accuracy"] == pytest.approx(np.mean(hits["all"]))
    assert results["robustness"]["imagenet_a"]["accuracy"] == pytest.approx(np.mean(hits["restricted"]))


@pytest.mark.extended
def test_imagenet_c_has_a_table_and_an_mce(imagenet_classifier, tmp_path):
    classes = dict.fromkeys(imagenet_wnids()[:2], 1)
    for corruption in CORRUPTIONS:
        for severity in range(1, 6):
            write_classes(tmp_path / "c" / corruption / str(severity), classes)
    clean = write_classes(tmp_path / "clean", classes)
    results = run(
        "evaluate", imagenet_classifier, tmp_path / "run", validation_dir=clean, imagenet_c_dir=tmp_path / "c"
    )
    table = results["robustness"]["imagenet_c"]
    assert table["mce"] == pytest.approx(np.mean([row["relative_error"] for row in table["per_corruption"].values()]))
    assert set(table["per_corruption"]) == set(CORRUPTIONS)


# --- processes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "model"),
    [pytest.param("evaluate", "classifier", marks=pytest.mark.extended), ("finetune", "pretrained")],
)
def test_two_processes_do_what_one_does(task, model, request, classifier, pretrained, tmp_path):
    source = request.getfixturevalue(model)
    # dropped paths are drawn by each process for itself
    values = {"max_train_steps": 3, "per_device_train_batch_size": 64, "drop_path_rate": 0.0, "mixup": 0, "cutmix": 0}
    result = run_forked(SCRIPT, flags(task, source, tmp_path / "two", **values), num_processes=2)
    assert result.returncode == 0, result.output[-4000:]
    assert "world size 2" in result.output
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["hardware"]["processes"] == 2
    one = run(task, source, tmp_path / "one", **{**values, "per_device_train_batch_size": 128})
    assert two["metrics"]["accuracy"] == pytest.approx(
        one["metrics"]["accuracy"], abs=1e-9 if task == "evaluate" else 0.01
    )
    assert two["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-4)


# --- the Hub --------------------------------------------------------------------------------------------------------


def push_run(task: str, hub: LoopbackHub, output_dir: Path, source: Path, home: Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    argv = flags(task, source, output_dir, "--push_to_hub", "--hub_model_id", "someone/tuned", max_train_steps=2)
    command = [sys.executable, str(SCRIPT), *argv]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.extended
def test_a_run_pushes_its_model_and_tells_nobody_the_token(pretrained, tmp_path):
    with LoopbackHub({TOKEN: Account("someone")}) as hub:
        result = push_run("finetune", hub, tmp_path / "run", pretrained, tmp_path / "home")
        assert result.returncode == 0, result.stderr[-3000:]
        assert {"config.json", "model.safetensors", "README.md", "results.json"} <= hub.files("someone/tuned").keys()
        assert not any(TOKEN.encode() in content for content in hub.files("someone/tuned").values())
    assert TOKEN not in result.stdout + result.stderr
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


def test_a_token_that_may_not_write_is_refused_before_anything_is_trained(pretrained, tmp_path):
    with LoopbackHub({TOKEN: Account("someone", may_write=False)}) as hub:
        result = push_run("finetune", hub, tmp_path / "run", pretrained, tmp_path / "home")
    assert result.returncode == 1
    assert "someone/tuned" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_task_that_leaves_no_model_is_not_pushed(pretrained, tmp_path):
    with pytest.raises(RecipeError, match="knn with these flags leaves no model"):
        main(flags("knn", pretrained, tmp_path / "run", "--push_to_hub"))


def test_only_a_classifier_can_be_evaluated(pretrained, tmp_path):
    with pytest.raises(UnfitCheckpointError, match="no trained classifier: fine-tune it first"):
        main(flags("evaluate", pretrained, tmp_path / "run"))


def test_images_of_classes_that_the_model_does_not_know_are_refused_by_name(classifier, tmp_path):
    images = write_classes(tmp_path / "animals", {"3": 1, "zebra": 1})
    with pytest.raises(ValueError, match="zebra"):
        main(flags("evaluate", classifier, tmp_path / "run", validation_dir=images))


def test_other_channels_than_the_checkpoints_are_refused(pretrained, tmp_path):
    with pytest.raises(UnfitCheckpointError, match="num_channels: 3 there, 1 in the recipe"):
        main(flags("finetune", pretrained, tmp_path / "run", num_channels=1))


def test_fewer_images_than_a_step_takes_are_refused(pretrained, tmp_path):
    with pytest.raises(ValueError, match=r"10 training images are fewer than one global batch of 128"):
        main(flags("finetune", pretrained, tmp_path / "run", train_fraction=0.001))


def test_a_folder_that_is_no_imagenet_c_is_refused_before_it_is_read(classifier, tmp_path):
    with pytest.raises(ValueError, match="no ImageNet-C"):
        main(flags("evaluate", classifier, tmp_path / "run", imagenet_c_dir=write_classes(tmp_path / "x", {"a": 1})))


def test_files_without_held_out_images_are_refused(pretrained, tmp_path):
    files = write_shards(tmp_path / "shards")
    with pytest.raises(ValueError, match="no images to test on: give --validation_split"):
        main(flags("knn", pretrained, tmp_path / "run", data_files=[files]))


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UnfitCheckpointError, match="nowhere"):
        main(flags("finetune", tmp_path / "nowhere", tmp_path / "run"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_fraction", 0),
        ("train_fraction", 1.5),
        ("layer_decay", 0),
        ("label_smoothing", 1),
        ("random_erasing", 2),
        ("ema_decay", 1.0),
        ("knn_k", [0]),
        ("probe_learning_rates", [-1.0]),
        ("corruptions", ["rain"]),
    ],
)
def test_a_flag_out_of_range_is_refused_by_name(name, value, tmp_path):
    with pytest.raises(ValueError, match=name):
        main(flags("finetune", "unused", tmp_path / "run", **{name: value}))


def test_too_many_bad_images_end_a_training_and_a_few_are_left_out_of_a_test(classifier, pretrained, tmp_path):
    images = write_classes(tmp_path / "images", {"0": 6, "1": 6})
    for index in range(3):
        (images / "1" / f"1_{index}.png").write_bytes(b"no image")
    values = {"train_dir": images, "validation_dir": images, "per_device_train_batch_size": 4}
    with pytest.raises(TooManyBadImagesError, match=r"3 of 12 training images cannot be decoded"):
        run("finetune", pretrained, tmp_path / "run", max_train_steps=9, **values)
    results = run("evaluate", classifier, tmp_path / "test", **values)
    assert results["test_images"] == 9


# --- what can go wrong in between -----------------------------------------------------------------------------------


def test_latest_is_the_newest_checkpoint_that_is_whole(classifier, pretrained, tmp_path):
    folder = tmp_path / "run"
    run("finetune", pretrained, folder, max_train_steps=8, checkpointing_steps=3, drop_path_rate=0.0)
    expected = load_file(folder / "model.safetensors")
    damaged = folder / "checkpoint-6" / "model.safetensors"  # as a kill while saving leaves it
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (folder / "checkpoint-7").mkdir()
    for name in ("model.safetensors", "checkpoint-8"):
        path = folder / name
        (shutil.rmtree if path.is_dir() else Path.unlink)(path)
    resumed = flags("finetune", pretrained, folder, "--resume_from_checkpoint", "latest", max_train_steps=8)
    with pytest.raises(ValueError, match=r"drop_path_rate: 0.0 then, 0.1 now"):
        main(resumed)
    assert main([*resumed, "--drop_path_rate", "0.0", "--checkpointing_steps", "3"]) == 0
    assert min(logged(folder, "loss")) == 1
    again = load_file(folder / "model.safetensors")
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert not (folder / "checkpoint-7").exists()


@pytest.mark.parametrize(("name", "value"), [("seed", 7), ("base_learning_rate", 1.0), ("train_fraction", 0.5)])
def test_a_run_is_not_resumed_with_other_settings(classifier, pretrained, name, value):
    argv = flags("finetune", pretrained, classifier, "--resume_from_checkpoint", "latest", max_train_steps=8)
    with pytest.raises(ValueError, match="other settings"):
        main([*argv, f"--{name}", str(value)])


def test_resuming_a_finished_run_changes_no_weight(pretrained, tmp_path):
    folder, values = tmp_path / "run", {"max_train_steps": 5, "ema_decay": 0.5}
    first = run("finetune", pretrained, folder, **values)
    expected = load_file(folder / "model.safetensors")
    (folder / "results.json").unlink()
    second = run("finetune", pretrained, folder, "--resume_from_checkpoint", "latest", **values)
    again = load_file(folder / "model.safetensors")
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert second["metrics"] == first["metrics"]
    assert max(logged(folder, "loss")) == 5


def test_a_model_that_diverged_is_not_saved(pretrained, tmp_path):
    values = {"max_train_steps": 3, "logging_steps": 100, "base_learning_rate": 1e30, "evaluation_steps": 100}
    with pytest.raises(FloatingPointError, match="learning rate"):
        run("finetune", pretrained, tmp_path / "run", **values)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_checkpoint_of_a_run_is_evaluated_with_the_runs_own_statistics(pretrained, tmp_path):
    values = {"image_mean": [0.9, 0.1, 0.5], "image_std": [0.1, 0.5, 0.25], "max_train_steps": 4}
    expected = run("finetune", pretrained, tmp_path / "run", **values)
    found = run("evaluate", tmp_path / "run" / "checkpoint-4", tmp_path / "test")
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)


def test_a_model_of_grey_images_works_as_its_card_says(tmp_path):
    assert pretrain(tmp_path / "pretrained", max_train_steps=2, probe_samples=0, num_channels=1) == 0
    run("finetune", tmp_path / "pretrained", tmp_path / "run", max_train_steps=2)
    (snippet,) = re.findall(r"```python\n(.*?)```", (tmp_path / "run" / "README.md").read_text(), flags=re.DOTALL)
    names = {"image": Image.effect_noise((20, 20), 64).convert("RGB")}
    exec(snippet.replace("REPOSITORY_OR_FOLDER_OF_THIS_CARD", str(tmp_path / "run")), names)
    assert names["model"].config.id2label[names["label"]] in "0123456789"


@pytest.mark.parametrize("task", ["linear_probe", "knn"])
def test_frozen_features_of_a_classifier_without_its_last_norm_are_refused(task, classifier, tmp_path):
    with pytest.raises(UnfitCheckpointError, match="no last LayerNorm: take the checkpoint that it was made from"):
        main(flags(task, classifier, tmp_path / "run"))


def test_a_folder_that_holds_a_model_is_not_written_into(classifier, pretrained, tmp_path):
    before = (classifier / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds the model that the run starts from"):
        main(flags("evaluate", classifier, classifier, "--overwrite_output_dir"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds another run, or a model"):
        main(flags("knn", pretrained, tmp_path))
    assert (classifier / "model.safetensors").read_bytes() == before


def test_a_wrong_flag_deletes_nothing(pretrained, tmp_path):
    run("knn", pretrained, tmp_path / "run")
    with pytest.raises(ValueError, match="no/such/folder"):
        main(flags("knn", pretrained, tmp_path / "run", "--overwrite_output_dir", validation_dir="no/such/folder"))
    assert (tmp_path / "run" / "results.json").exists()


def test_held_out_images_without_labels_are_refused_before_training(pretrained, tmp_path):
    write_classes(tmp_path / "images", {"one": 3})
    with pytest.raises(ValueError, match="has no labels"):
        main(flags("finetune", pretrained, tmp_path / "run", validation_dir=tmp_path / "images" / "one"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_without_a_recipe_the_task_chooses_it_and_other_images_get_the_plain_one():
    assert default_recipe(["--task", "knn"]).name == "knn.yaml"
    assert default_recipe([]) == RECIPES / "digits" / "finetune.yaml"
    assert default_recipe(["--task", "knn", "--train_dir", "x"]) == RECIPES / "classification.yaml"


def test_a_probe_of_two_processes_is_one_model(pretrained, tmp_path):
    values = {"max_train_steps": 6, "per_device_train_batch_size": 64, "probe_learning_rates": [100.0]}
    result = run_forked(SCRIPT, flags("linear_probe", pretrained, tmp_path / "two", **values), num_processes=2)
    assert result.returncode == 0, result.output[-4000:]
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    one = run("evaluate", tmp_path / "two", tmp_path / "one")
    # each process has statistics of its own while training; what is tested must be what is saved
    assert one["metrics"]["loss"] == pytest.approx(two["metrics"]["loss"], rel=1e-4)
    assert one["metrics"]["accuracy"] == pytest.approx(two["metrics"]["accuracy"], abs=1e-9)


def test_a_signal_ends_fine_tuning_with_a_checkpoint_and_resuming_changes_nothing(pretrained, tmp_path):
    values = {"max_train_steps": 24, "dataloader_num_workers": 1, "evaluation_steps": 1000}
    run("finetune", pretrained, tmp_path / "whole", **values)
    folder = tmp_path / "stopped"
    process = start_forked(SCRIPT, flags("finetune", pretrained, folder, **values), tmp_path / "log.txt")
    while not (folder / "metrics.jsonl").exists() and process.is_alive():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(120)
    output = (tmp_path / "log.txt").read_text()
    assert process.exitcode == 143, output[-3000:]
    assert "stopped by SIGTERM" in output
    assert max(logged(folder, "loss")) < 24
    assert not (folder / "results.json").exists()

    run("finetune", pretrained, folder, "--resume_from_checkpoint", "latest", **values)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(first[name], second[name]) for name in first)
