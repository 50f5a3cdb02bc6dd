"""What both dense scripts promise: how a run starts, what it leaves, how it resumes, and what it refuses."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from dense_runs import CROP_SIZE, ENCODER, SCRIPTS, compose, copied, edit_annotations, flags, launch, run, save_encoder
from drawing import drawn
from loopback_hub import Account, LoopbackHub
from PIL import Image
from references import TINY_SWIN
from runs import metrics, series, weights
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from mimae import MISimMIMConfig, MISimMIMForPreTraining
from mimae.dense.mask_rcnn import MaskRCNNForInstanceSegmentation
from mimae.flags.option import RecipeError
from mimae.jobs.run_folder import OutputDirNotEmptyError
from mimae.training.bad_images import TooManyBadImagesError
from mimae.training.hf_trainer.dense import DenseTrainer

TASKS = list(SCRIPTS)
MODELS = {"segmentation": UperNetForSemanticSegmentation, "detection": MaskRCNNForInstanceSegmentation}
METRICS = {"segmentation": "mean_iou", "detection": "mask_ap"}
TOKEN = "hf_" + "Secret" * 6


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return compose(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module", params=TASKS)
def task(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def finished(task, images, encoder, tmp_path_factory) -> Path:
    """A run of four steps, evaluated after the second and the last."""
    folder = tmp_path_factory.mktemp(task) / "run"
    with drawn():
        run(task, images, encoder, folder)
    return folder


def assert_same_weights(folder: Path, other: Path) -> None:
    first, second = weights(folder), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# --- what a run leaves ----------------------------------------------------------------------------------------------


def test_a_run_leaves_its_results_pictures_and_metrics_at_their_steps(task, finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["task"] == task
    assert results["training_images"] == 8
    assert results["test_images"] == 3
    assert results["recipe"]["drop_path_rate"] == 0.1  # the default recipe's
    assert all(0 <= value <= 1 for value in results["metrics"].values())
    evaluations = series(finished, f"eval_{METRICS[task]}")
    assert list(evaluations) == [2, 4]
    assert evaluations[4] == results["metrics"][METRICS[task]]
    assert list(series(finished, "loss")) == [1, 2, 3, 4]
    for name in ("README.md", "curves.png", "predictions.png"):
        assert (finished / name).stat().st_size > 0, name
    assert "predictions.png" in (finished / "README.md").read_text()
    assert (finished / "checkpoint-2" / "manifest.json").exists()


def test_what_a_run_leaves_loads_and_takes_any_photograph_through_its_image_processor(task, finished):
    model = MODELS[task].from_pretrained(finished).eval()
    assert model.config.backbone_config.drop_path_rate == 0.1
    assert model.config.id2label[model.config.num_labels - 1] == "9"
    processor = AutoImageProcessor.from_pretrained(finished)
    photograph = Image.new("RGB", (70, 50), "red")
    pixel_values = processor(photograph, return_tensors="pt").pixel_values
    with torch.no_grad():
        output = model(pixel_values)
    if task == "segmentation":
        (segmentation,) = processor.post_process_semantic_segmentation(output, target_sizes=[(50, 70)])
        assert segmentation.shape == (50, 70)
    else:
        assert output.detections[0]["masks"].isfinite().all()


def test_an_upload_has_model_card_and_pictures_and_not_the_token(images, encoder, tmp_path):
    argv = flags("detection", images, encoder, tmp_path / "run", max_train_steps=1, hub_model_id="someone/detector")
    with LoopbackHub({TOKEN: Account("someone")}) as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        result = launch("detection", [*argv, "--push_to_hub"], **environment)
        assert result.returncode == 0, result.stderr[-3000:]
        files = hub.files("someone/detector")
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "predictions.png"} <= set(
        files
    )
    assert not any(TOKEN.encode() in content for content in files.values())
    assert TOKEN not in result.stdout + result.stderr


@pytest.mark.parametrize("name", TASKS)
def test_help_names_the_flags_of_the_task_and_of_the_model(capsys, name):
    with pytest.raises(SystemExit) as end:
        SCRIPTS[name].main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "--max_bad_image_fraction" in out
    assert "--use_relative_position_bias" in out


# --- where it starts ------------------------------------------------------------------------------------------------

ORIGINS = {
    "vit_mae": lambda: ViTMAEForPreTraining(ViTMAEConfig(**ENCODER)),  # saves the key names of transformers 4
    "vit": lambda: ViTModel(ViTConfig(**{name: ENCODER[name] for name in ENCODER if "decoder" not in name})),
}


@pytest.mark.parametrize(
    ("task", "origin"), [*(("segmentation", origin) for origin in ("mimae", *ORIGINS)), ("detection", "vit_mae")]
)
def test_the_encoder_of_every_kind_of_checkpoint_arrives_and_the_log_names_what_is_new(
    task, origin, images, encoder, tmp_path, capsys
):
    source = encoder
    if origin in ORIGINS:
        source = tmp_path / "origin"
        ORIGINS[origin]().save_pretrained(source)
    run(task, images, source, tmp_path / "run", max_train_steps=1)  # at the rate that the warm-up starts from, 0
    log = capsys.readouterr().err
    assert f"new, as {source} has no weights for it" in log
    assert {"segmentation": "fpn.*.weight", "detection": "relative_positions.height"}[task] in log
    there, here = load_file(source / "model.safetensors"), weights(tmp_path / "run")
    if origin == "vit_mae":
        assert torch.equal(
            here["backbone.layers.5.attention.q_proj.weight"],
            there["vit.encoder.layer.5.attention.attention.query.weight"],
        )
    for name in ("embeddings.patch_embeddings.projection.weight", "embeddings.cls_token"):
        original = next(tensor for key, tensor in there.items() if key.removeprefix("vit.") == name)
        assert torch.equal(here[f"backbone.{name}"], original)


def test_an_untrained_control_has_the_architecture_alone(images, encoder, tmp_path):
    results = run("segmentation", images, encoder, tmp_path / "run", max_train_steps=1, untrained=True)
    assert results["untrained"] is True
    name = "layers.2.mlp.fc1.weight"
    here, there = weights(tmp_path / "run")[f"backbone.{name}"], weights(encoder)[f"vit.{name}"]
    assert here.shape == there.shape
    assert not torch.equal(here, there)


def test_a_model_may_start_from_sizes_alone_and_never_by_oversight(task, images, tmp_path):
    sizes = {name: ENCODER[name] for name in ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    results = run(task, images, None, tmp_path / "run", max_train_steps=1, intermediate_size=64, **sizes)
    assert results["model"] == "a model of the recipe's sizes"
    # the default recipe's fields are of no model in particular
    with pytest.raises(ValueError, match="give --model_name_or_path, or --preset"):
        run(task, images, None, tmp_path / "none")


def test_a_preset_takes_the_place_of_a_checkpoint(images, tmp_path):
    results = run("segmentation", images, None, tmp_path, preset="vit-tiny", max_train_steps=1, evaluation_steps=9)
    assert results["model"] == "vit-tiny"
    assert weights(tmp_path)["backbone.embeddings.cls_token"].shape[-1] == 192


def test_a_swin_is_refused_by_its_name(task, images, tmp_path):
    MISimMIMForPreTraining(MISimMIMConfig(**TINY_SWIN)).save_pretrained(tmp_path / "swin")
    with pytest.raises(RecipeError, match="'misimmim' has no backbone"):
        run(task, images, tmp_path / "swin", tmp_path / "run")


# --- stopped, resumed, repeated -------------------------------------------------------------------------------------


def test_a_stopped_run_resumes_to_the_end_of_an_uninterrupted_one(
    task, images, encoder, finished, tmp_path, monkeypatch
):
    original = DenseTrainer.training_step

    def step_and_signal(trainer, *args, **kwargs):
        if trainer.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, *args, **kwargs)

    folder, workers = tmp_path / "run", {"dataloader_num_workers": 2}  # of which nothing follows
    with monkeypatch.context() as patch:
        patch.setattr(DenseTrainer, "training_step", step_and_signal)
        assert SCRIPTS[task].main(flags(task, images, encoder, folder, **workers)) == 143
    assert (folder / "checkpoint-3" / "manifest.json").exists()
    assert not (folder / "results.json").exists()

    with pytest.raises(ValueError, match="horizontal_flip"):
        run(task, images, encoder, folder, resume_from_checkpoint="latest", horizontal_flip=0.0)
    with pytest.raises(ValueError, match="max_scale"):
        run(task, images, encoder, folder, resume_from_checkpoint="latest", max_scale=4.0)
    results = run(task, images, encoder, folder, resume_from_checkpoint="latest", **workers)
    assert results["metrics"] == json.loads((finished / "results.json").read_text())["metrics"]
    assert series(folder, "loss") == series(finished, "loss")
    assert_same_weights(folder, finished)


def test_resuming_a_finished_run_tests_it_again_and_trains_nothing(task, images, encoder, finished, tmp_path):
    folder = copied(finished, tmp_path / "run")
    before = metrics(folder)
    results = run(task, images, encoder, folder, resume_from_checkpoint="latest")
    assert results["metrics"] == json.loads((finished / "results.json").read_text())["metrics"]
    assert series(folder, "loss") == {line["step"]: line["loss"] for line in before if "loss" in line}
    assert_same_weights(folder, finished)


def test_another_run_stays_until_a_new_one_may_begin(task, images, encoder, finished, tmp_path):
    folder = copied(finished, tmp_path / "run")
    with pytest.raises(OutputDirNotEmptyError, match="overwrite_output_dir"):
        run(task, images, encoder, folder)
    with pytest.raises(ValueError, match="fewer than one global batch"):
        run(task, images, encoder, folder, overwrite_output_dir=True, per_device_train_batch_size=64)
    assert_same_weights(folder, finished)
    run(task, images, encoder, folder, overwrite_output_dir=True, max_train_steps=1)
    assert list(series(folder, "loss")) == [1]
    assert not (folder / "checkpoint-4").exists()


def test_bf16_and_accumulated_batches_end_with_finite_losses_and_metrics(task, images, encoder, tmp_path):
    values = {"mixed_precision": "bf16", "gradient_accumulation_steps": 2, "max_train_steps": 2}
    results = run(task, images, encoder, tmp_path, **values)
    assert all(0 <= value <= 1 for value in results["metrics"].values())
    assert all(0 < loss < 20 for loss in series(tmp_path, "loss").values())
    assert all(
        tensor.dtype is torch.float32 for name, tensor in weights(tmp_path).items() if "num_batches" not in name
    )


def test_recomputed_activations_change_no_weight(task, images, encoder, finished, tmp_path):
    run(task, images, encoder, tmp_path, gradient_checkpointing=True)
    for (name, tensor), other in zip(weights(tmp_path).items(), weights(finished).values(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-5, msg=name)


# --- bad input ------------------------------------------------------------------------------------------------------


def spoilt(task: str, folder: Path, split: str) -> Path:
    """Cuts one file of a split short: a mask for segmentation, an image for detection. Returns it."""
    path = folder / {"segmentation": f"masks/{split}/000001.png", "detection": f"images/{split}/000001.jpg"}[task]
    path.write_bytes(path.read_bytes()[:60])
    return path


def test_what_cannot_be_decoded_is_replaced_and_named_up_to_a_fraction(task, images, encoder, tmp_path, capsys):
    folder = copied(images, tmp_path / "scenes")
    path = spoilt(task, folder, "train")
    run(task, folder, encoder, tmp_path / "run", max_bad_image_fraction=0.125)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "were replaced" in line]
    assert f"/{path.stem}." in warning
    with pytest.raises(TooManyBadImagesError, match="1 of 8 training images cannot be decoded"):
        run(task, folder, encoder, tmp_path / "other", max_bad_image_fraction=0.1)
    assert not (tmp_path / "other" / "model.safetensors").exists()


def test_what_cannot_be_tested_is_left_out_named_and_not_counted(task, images, encoder, tmp_path, capsys):
    folder = copied(images, tmp_path / "scenes")
    path = spoilt(task, folder, "validation")
    results = run(task, folder, encoder, tmp_path / "run", max_train_steps=1)
    assert results["test_images"] == 2
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "were left out" in line]
    assert f"/{path.stem}." in warning


def test_without_images_the_missing_flags_are_named(encoder, images, tmp_path):
    with pytest.raises(ValueError, match="--dataset_name, --train_dir and --data_files"):
        run("segmentation", images, encoder, tmp_path, train_dir=None)
    for split in ("train", "validation"):
        missing = {f"{split}_annotation_file": None, f"{split}_image_dir": None}
        with pytest.raises(RecipeError, match=f"give --{split}_annotation_file and --{split}_image_dir"):
            run("detection", images, encoder, tmp_path, **missing)


def test_sizes_that_do_not_fit_the_patches_are_refused_before_anything_is_read(encoder, images, tmp_path):
    with pytest.raises(RecipeError, match=r"crop_size=30 must be a multiple of .* 4 pixels"):
        run("segmentation", images / "none", encoder, tmp_path, crop_size=30)
    with pytest.raises(RecipeError, match=f"image_size=64: the model sees crops of crop_size={CROP_SIZE}"):
        run("segmentation", images / "none", encoder, tmp_path, image_size=64)
    with pytest.raises(RecipeError, match="per_device_train_batch_size=1 must be 2 or more"):
        run("segmentation", images / "none", encoder, tmp_path, per_device_train_batch_size=1)
    with pytest.raises(RecipeError, match="image_size=40 must be a multiple of 16"):
        run("detection", images / "none", encoder, tmp_path, image_size=40)
    with pytest.raises(RecipeError, match="give one number"):
        run("detection", images / "none", encoder, tmp_path, image_size=[48, 64])


def test_the_task_alone_says_whether_the_encoder_has_a_pyramid(task, encoder, images, tmp_path):
    with pytest.raises(RecipeError, match=r"add_fpn: .* leave it out"):
        run(task, images, encoder, tmp_path, add_fpn=task == "detection")


def test_held_out_images_of_other_classes_are_refused(encoder, images, tmp_path):
    folder = copied(images, tmp_path / "scenes")
    mask = folder / "masks" / "validation" / "000001.png"
    Image.new("L", (48, 48), 77).save(mask)
    edit_annotations(folder, "validation", lambda content: content["categories"][0].update(name="naught"))
    with pytest.raises(ValueError, match=r"000001\.png\) has a pixel of value 77, but the 11 classes"):
        run("segmentation", folder, encoder, tmp_path / "segmentation")
    with pytest.raises(ValueError, match="'naught'"):
        run("detection", folder, encoder, tmp_path / "detection")
