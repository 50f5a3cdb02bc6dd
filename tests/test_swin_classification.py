"""run_image_classification.py with a Swin, task by task: from every kind of checkpoint, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from references import TINY_SWIN
from runs import TINY_SWIN_MODEL, pretrain
from safetensors.torch import load_file
from transformers import SwinConfig, SwinForImageClassification, SwinForMaskedImageModeling, SwinModel

from mimae import MISimMIMForImageClassification
from mimae.families.encoders.swin import interpolate_table
from mimae.families.warm_start import Checkpoint, UnfitCheckpointError
from mimae.flags.option import RecipeError
from mimae.run_image_classification import main

TINY = {name: value for name, value in TINY_SWIN.items() if name != "mask_patch_size"}
SHORT = {
    "use_cpu": True,
    "cpu_threads": 1,
    "per_device_train_batch_size": 64,
    "report_to": "none",
    "logging_steps": 1,
    "warmup_epochs": 0,
    "evaluation_steps": 1000,
    "evaluation_crop_ratio": 1.0,
}
TABLES = "relative_position_bias_table"


def recipe(folder: Path, **values) -> list[str]:
    """The flags of a recipe with these values."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**SHORT, **values}))
    return ["--config", str(path)]


def run(task: str, output_dir: Path, *extra: str, **values) -> dict:
    """Runs in this process and returns what results.json holds; keys and values are a recipe's."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    argv = recipe(output_dir.parent / f"recipe_of_{output_dir.name}", task=task, **values)
    assert main([*argv, "--output_dir", str(output_dir), *extra]) == 0
    return json.loads((output_dir / "results.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """What a pre-training of a few steps leaves."""
    folder = tmp_path_factory.mktemp("swin") / "pretrained"
    # a rate that is enough to tell it from an untrained one
    values = {"max_train_steps": 3, "probe_samples": 0, "base_learning_rate": 2e-3, "warmup_epochs": 0}
    assert pretrain(folder, model=TINY_SWIN_MODEL, **values) == 0
    return folder


@pytest.fixture(scope="module")
def classifier(pretrained) -> Path:
    folder = pretrained.parent / "classifier"
    run("finetune", folder, model_name_or_path=pretrained, max_train_steps=4, drop_path_rate=0.1)
    return folder


# --- the tasks ------------------------------------------------------------------------------------------------------


def test_fine_tuning_leaves_a_model_that_is_evaluated_alike(classifier, tmp_path):
    results = json.loads((classifier / "results.json").read_text())
    assert results["test_images"] == 360
    for name in ("curves.png", "confusion_matrix.png", "features.png", "README.md", "preprocessor_config.json"):
        assert (classifier / name).exists(), name
    again = run("evaluate", tmp_path / "run", model_name_or_path=classifier)
    assert again["metrics"] == pytest.approx(results["metrics"], rel=1e-6)
    model = MISimMIMForImageClassification.from_pretrained(classifier)
    assert list(model.config.id2label.values()) == list("0123456789")


def test_layer_decay_moves_early_layers_of_a_swin_less(pretrained, tmp_path):
    """One step of AdamW moves each weight by its learning rate, which is 0.3 of the next layer's."""
    values = {"max_train_steps": 1, "layer_decay": 0.3, "weight_decay": 0.0, "mixup": 0, "cutmix": 0}
    run("finetune", tmp_path / "run", model_name_or_path=pretrained, base_learning_rate=4e-3, **values)
    before, after = weights(pretrained), weights(tmp_path / "run")
    names = {
        0: "swin.embeddings.patch_embeddings.projection.weight",
        1: "swin.encoder.layers.0.blocks.0.mlp.fc2.weight",
        2: "swin.encoder.layers.0.downsample.reduction.weight",
        3: "swin.encoder.layers.1.blocks.0.mlp.fc2.weight",
        4: "swin.encoder.layers.1.blocks.1.mlp.fc2.weight",
        5: "swin.layernorm.weight",
    }
    for layer, name in names.items():
        step = (after[name] - before[name]).abs().max().item()
        assert step == pytest.approx(1e-3 * 0.3 ** (5 - layer), rel=0.02), name


def test_a_resumed_fine_tuning_of_a_swin_equals_an_uninterrupted_one(classifier, pretrained, tmp_path):
    folder = tmp_path / "run"
    values = {"model_name_or_path": pretrained, "max_train_steps": 4, "drop_path_rate": 0.1}
    run("finetune", folder, checkpointing_steps=2, **values)
    for name in ("model.safetensors", "results.json"):
        (folder / name).unlink()
    run("finetune", folder, "--resume_from_checkpoint", str(folder / "checkpoint-2"), **values)
    first, second = weights(classifier), weights(folder)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(folder) == losses(classifier)


def test_a_probe_of_the_last_map_leaves_a_classifier_that_is_as_good(pretrained, tmp_path):
    rates = [1.0, 100.0]
    values = {"model_name_or_path": pretrained, "max_train_steps": 4, "probe_learning_rates": rates}
    results = run("linear_probe", tmp_path / "run", **values)
    again = run("evaluate", tmp_path / "evaluated", model_name_or_path=tmp_path / "run")
    assert again["metrics"]["accuracy"] == pytest.approx(results["metrics"]["accuracy"], abs=1 / 360)
    assert (tmp_path / "run" / "README.md").exists()
    encoder, kept = weights(pretrained), weights(tmp_path / "run")
    assert all(torch.equal(kept[name], encoder[name]) for name in kept if name.startswith("swin."))


def test_neighbours_vote_by_the_mean_of_the_last_map(pretrained, tmp_path):
    results = run("knn", tmp_path / "trained", model_name_or_path=pretrained, knn_k=[1])
    control = run("knn", tmp_path / "control", "--untrained", model_name_or_path=pretrained, knn_k=[1])
    assert results["metrics"]["accuracy"] > 0.2
    assert control["metrics"] != results["metrics"]


# --- what it starts from --------------------------------------------------------------------------------------------


def test_a_published_simmim_and_the_stock_swin_made_of_ours_start_the_same(pretrained, tmp_path):
    """Their weights are ours: every task must see what it sees from our own checkpoint."""
    ours = weights(pretrained)
    published = SwinForMaskedImageModeling(SwinConfig(**TINY))
    published.load_state_dict({name: ours[name] for name in published.state_dict()})
    published.save_pretrained(tmp_path / "published")
    assert any("attention.self.query" in name for name in weights(tmp_path / "published"))  # the legacy names
    exported = SwinModel(SwinConfig(**TINY))
    exported.load_state_dict({name: ours[f"swin.{name}"] for name in exported.state_dict()})
    exported.save_pretrained(tmp_path / "exported")

    processor = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    expected = run(
        "knn", tmp_path / "ours", model_name_or_path=pretrained, knn_k=[1, 5], feature_pooling="mean", **processor
    )
    for name in ("published", "exported"):
        found = run("knn", tmp_path / f"of_{name}", model_name_or_path=tmp_path / name, knn_k=[1, 5], **processor)
        assert found["metrics"] == expected["metrics"]


def test_the_stock_swins_classifier_is_evaluated_as_it_is(tmp_path):
    labels = {"id2label": dict(enumerate("0123456789")), "label2id": {name: i for i, name in enumerate("0123456789")}}
    torch.manual_seed(0)
    stock = SwinForImageClassification(SwinConfig(**TINY, **labels))
    torch.nn.init.normal_(stock.classifier.weight)
    stock.save_pretrained(tmp_path / "stock")
    assert run("evaluate", tmp_path / "run", model_name_or_path=tmp_path / "stock")["test_images"] == 360
    checkpoint = Checkpoint(str(tmp_path / "stock"))
    model = checkpoint.load(MISimMIMForImageClassification, checkpoint.config({}), with_head=True).eval()
    pixel_values = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(pixel_values).logits, stock.eval()(pixel_values).logits)


def test_a_swin_is_trained_from_scratch_by_its_preset(tmp_path):
    small = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "encoder_stride": 4, "mask_patch_size": 4}
    sizes = {"image_size": 16, "patch_size": 2, "window_size": 2, **small}
    results = run("finetune", tmp_path / "run", model_type="misimmim", preset="swin-tiny", max_train_steps=2, **sizes)
    assert results["model"] == "swin-tiny"
    assert len(losses(tmp_path / "run")) == 2


def test_larger_images_and_windows_are_fine_tuned_with_interpolated_tables(pretrained, tmp_path, capsys):
    values = {"image_size": 24, "window_size": 6, "max_train_steps": 1, "base_learning_rate": 1e-12}
    run("finetune", tmp_path / "run", model_name_or_path=pretrained, **values)
    log = capsys.readouterr().err
    assert "windows of 4 x 4 tokens are interpolated to 6 x 6" in log
    assert "are padded" not in log
    before, after = weights(pretrained), weights(tmp_path / "run")
    names = [name for name in after if name.endswith(TABLES)]
    assert len(names) == 4
    for name in names:
        torch.testing.assert_close(after[name], interpolate_table(before[name], 6), rtol=0, atol=1e-6)
        assert after[name].shape[0] == 11**2
    others = [name for name in after if name.startswith("swin.") and name not in names]
    assert all(torch.allclose(after[name], before[name], rtol=0, atol=1e-6) for name in others)
    assert (run("evaluate", tmp_path / "test", model_name_or_path=tmp_path / "run"))["test_images"] == 360


def test_larger_images_alone_change_no_weight_and_padding_is_told(pretrained, tmp_path, capsys):
    run("linear_probe", tmp_path / "run", model_name_or_path=pretrained, image_size=24, max_train_steps=1)
    log = capsys.readouterr().err
    assert log.count("24 x 24 pixels, and these are padded: window_size=3 would not pad") == 1
    assert "interpolated" not in log
    before, after = weights(pretrained), weights(tmp_path / "run")
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("swin."))


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"feature_pooling": "cls"}, RecipeError, r"feature_pooling='cls': misimmim has mean alone"),
        (
            {"classifier_pooling": "cls"},
            RecipeError,
            r"classifier_pooling: of model_type mimae, but the model is a 'misimmim'",
        ),
        ({"hidden_size": 32}, RecipeError, r"hidden_size: of model_type mimae, but the model is a 'misimmim'"),
        ({"model_type": "mimae"}, RecipeError, r"model_type='mimae', but .* is a 'misimmim' model"),
        ({"model_type": "bert"}, RecipeError, r"model_type='bert' is not known"),
        ({"preset": "swin-tiny"}, RecipeError, r"leave --preset out"),
        ({"depths": [2, 4]}, UnfitCheckpointError, r"depths: \[2, 2\] there, \[2, 4\] in the recipe"),
        ({"window_size": 8}, StrictDataclassError, r"window_size=8 must lie in 1..4"),
    ],
)
def test_what_does_not_suit_the_checkpoint_is_refused_by_name(values, error, message, pretrained, tmp_path):
    with pytest.raises(error, match=message):
        run("linear_probe", tmp_path / "run", model_name_or_path=pretrained, **values)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_vit_is_not_told_to_be_a_swin_nor_given_its_windows(tmp_path):
    assert pretrain(tmp_path / "vit", max_train_steps=1, probe_samples=0) == 0
    with pytest.raises(RecipeError, match=r"window_size: of a 'mimae' for segmentation and detection alone"):
        run("knn", tmp_path / "run", model_name_or_path=tmp_path / "vit", window_size=7)
    with pytest.raises(RecipeError, match=r"is a 'mimae' model"):
        run("knn", tmp_path / "run", model_name_or_path=tmp_path / "vit", model_type="misimmim")


def test_a_probe_of_a_swin_may_be_pushed_and_its_neighbours_may_not(pretrained, tmp_path):
    with pytest.raises(RecipeError, match="knn with these flags leaves no model"):
        run("knn", tmp_path / "run", "--push_to_hub", model_name_or_path=pretrained)
