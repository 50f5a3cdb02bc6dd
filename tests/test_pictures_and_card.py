"""Pictures show what was computed, and the card says what was measured and nothing else."""

import json
import re
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from runs import pretrain

from mimae.families.family import FAMILIES
from mimae.hub.model_card import write_backbone_card, write_classification_card, write_model_card
from mimae.jobs.results import source_commit
from mimae.modeling_mim import MIMForPreTrainingOutput, loss_terms_of, patchify, unpatchify
from mimae.pictures.curves import CLASSIFICATION_PANELS, pretraining_panels, save_curves
from mimae.pictures.reconstructions import reconstruction_images, save_reconstructions

pytestmark = pytest.mark.usefixtures("drawn")

PATCH_SIZE, NUM_MASKS, NUM_PATCHES = 4, 3, 3 * 5
MEAN, STD = {1: [0.3], 2: [0.4, 0.5], 3: [0.485, 0.456, 0.406]}, {1: [0.25], 2: [0.2, 0.3], 3: [0.229, 0.224, 0.225]}


def make_views(channels, norm_pix_loss):
    """Images of 12 × 20 pixels, masks, and the predictions of a model that is always right."""
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(values[channels])[:, None, None] for values in (MEAN, STD))
    pixel_values = (torch.rand(2, channels, 12, 20, generator=generator) - mean) / std
    mask = (torch.rand(2, NUM_MASKS, NUM_PATCHES, generator=generator) < 0.75).long()
    target = patchify(pixel_values, PATCH_SIZE)
    if norm_pix_loss:  # as ViTMAE's loss has it
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1.0e-6) ** 0.5
    return pixel_values, target[:, None].expand(-1, NUM_MASKS, -1, -1), mask


def masked_pixels(mask):
    """(B, N, L) to (B, N, 1, 12, 20), by plain repetition of the 3 × 5 grid."""
    grid = mask.bool().unflatten(-1, (3, 5))
    return grid.repeat_interleave(PATCH_SIZE, -2).repeat_interleave(PATCH_SIZE, -1)[:, :, None]


def test_patches_are_row_by_row_with_channels_last():
    image = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    patches = patchify(image, 2)
    assert patches.shape == (1, 6, 8)
    # The second patch of the first row: its pixels (0, 2), (0, 3), (1, 2), (1, 3), each with both channels.
    assert patches[0, 1].tolist() == [2, 26, 3, 27, 8, 32, 9, 33]
    assert torch.equal(unpatchify(patches, 2, (4, 6)), image)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_right_prediction_gives_back_the_image(channels, norm_pix_loss):
    pixel_values, logits, mask = make_views(channels, norm_pix_loss)
    images = reconstruction_images(pixel_values, logits, mask, unit_size=PATCH_SIZE, norm_pix_loss=norm_pix_loss)
    assert images.shape == (2, 1 + 2 * NUM_MASKS, channels, 12, 20)
    assert torch.equal(images[:, 0], pixel_values)
    expected = pixel_values[:, None].expand(-1, NUM_MASKS, -1, -1, -1)
    torch.testing.assert_close(images[:, 1 + NUM_MASKS :], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_visible_patches_are_the_originals_and_masked_ones_are_not_peeked_at(norm_pix_loss):
    pixel_values, logits, mask = make_views(3, norm_pix_loss)
    grey = torch.tensor([7.0, 8.0, 9.0])
    images = reconstruction_images(
        pixel_values, logits + 1, mask, unit_size=PATCH_SIZE, norm_pix_loss=norm_pix_loss, mask_color=grey
    )
    views, completed = images[:, 1 : 1 + NUM_MASKS], images[:, 1 + NUM_MASKS :]
    original = pixel_values[:, None].expand_as(views)
    masked = masked_pixels(mask).expand_as(views)
    assert torch.equal(views[~masked], original[~masked])
    assert torch.equal(completed[~masked], original[~masked])
    assert torch.equal(views[masked], grey[:, None, None].expand_as(views)[masked])
    assert (completed[masked] > original[masked]).all()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_the_png_holds_the_pixels_of_every_image(tmp_path, channels):
    pixel_values, logits, mask = make_views(channels, True)
    save_reconstructions(
        tmp_path / "reconstructions.png",
        pixel_values[:1],
        logits[:1].requires_grad_(),
        mask[:1],
        unit_size=PATCH_SIZE,
        norm_pix_loss=True,
        mean=MEAN[channels],
        std=STD[channels],
    )
    assert [path.name for path in tmp_path.iterdir()] == ["reconstructions.png"]
    picture = np.asarray(Image.open(tmp_path / "reconstructions.png").convert("RGB")).astype(int)
    scale, left, top = 6, 4, 56  # 12 × 20 pixels drawn 6-fold, below the titles
    mean, std = (torch.tensor(values[channels])[:, None, None] for values in (MEAN, STD))
    original = pixel_values[0] * std + mean
    if channels != 3:
        original = original.mean(0, keepdim=True).expand(3, -1, -1)
    drawn = picture[top : top + 12 * scale, left : left + 20 * scale]
    expected = (255 * original.movedim(0, -1).numpy()).repeat(scale, 0).repeat(scale, 1)
    assert np.abs(drawn - expected).max() <= 1
    assert (picture[top:, :left] == 255).all()
    # Half grey, in every view and nowhere else to this extent.
    grey = (np.abs(picture - 127.5) < 1).all(-1).sum()
    assert grey >= mask[0].sum() * (PATCH_SIZE * scale) ** 2


def write_metrics(path, lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))


def test_curves_are_drawn_from_what_is_there(tmp_path):
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    write_metrics(
        metrics,
        [
            {"step": 10, "reconstruction_loss": 0.9, "mi_active": 0.0, "learning_rate": 1e-4},
            '{"step": 20, "reconstr\n',
            {"step": 20, "reconstruction_loss": float("nan"), "mi_active": 1.0},
            {"step": 30, "reconstruction_loss": None, "mi_active": True, "note": "text"},
            {"step": 40, "reconstruction_loss": 0.4, "mi_active": True},
        ],
    )
    panels = pretraining_panels(loss_terms_of(MIMForPreTrainingOutput))
    save_curves(metrics, picture, panels=panels, gate_threshold=0.5)
    two_panels = Image.open(picture).size
    write_metrics(metrics, [{"step": 10, "reconstruction_loss": 0.9}])
    save_curves(metrics, picture, panels=panels)
    one_panel = Image.open(picture).size
    assert two_panels[0] == 2 * one_panel[0]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "curves.png"}


def test_nothing_to_draw_draws_nothing(tmp_path, caplog):
    write_metrics(tmp_path / "metrics.jsonl", [{"step": 1, "images_per_second": 5.0}])
    save_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", panels=CLASSIFICATION_PANELS)
    assert "no metric to draw" in caplog.text
    assert not (tmp_path / "curves.png").exists()


# --- the card -------------------------------------------------------------------------------------------------------

SUMMARY = {
    "model_type": "mimae",
    "dataset": "someone/digits",
    "num_images": 1797,
    "steps": 400,
    "epochs": 20.0,
    "world_size": 2,
    "device": "CPU / 2 cores",
    "seconds": 181234.5,
    "final": {"reconstruction_loss": 0.4125, "mi_max_loss": 0.9},
    "gate_opened_at_step": 130,
    "gate_threshold": 0.5,
    "probe_before": {"knn_accuracy": 0.81},
    "probe_after": {"knn_accuracy": 0.9312, "linear_accuracy": 0.955},
    "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
    "seed": 17,
}
RECIPE = {"dataset_name": "someone/digits", "base_learning_rate": 2.0e-4, "mask_ratio": 0.75, "train_dir": None}


def write_card(folder, summary=SUMMARY, recipe=RECIPE, pictures=()):
    return write_model_card(folder, summary=summary, recipe=recipe, pictures=list(pictures)).read_text()


def recipe_in(card):
    return yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])


def test_the_front_matter_is_what_the_hub_reads(tmp_path):
    write_card(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "transformers",
        "image-feature-extraction",
    )
    assert data.tags == ["mimae", "masked-image-modeling", "self-supervised"]
    assert data.datasets == ["someone/digits"]
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize("name", [None, "digits", "{folder}", "here/images"])
def test_only_a_name_on_the_hub_is_called_a_hub_data_set(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "images").mkdir(parents=True)
    write_card(tmp_path, recipe={"dataset_name": name and name.format(folder=tmp_path)})
    assert ModelCard.load(tmp_path / "README.md").data.datasets is None


def test_the_card_gives_the_figures_of_the_run(tmp_path):
    card = write_card(tmp_path, pictures=["curves.png", str(tmp_path / "pictures" / "step_400.png")])
    for line in (
        "- Images: 1797",
        "- Seconds: 181234",
        "- Device: CPU / 2 cores",
        "- Versions: torch 2.11.0, transformers 5.17.0",
        "| L_rec (Eq. 1) | 0.4125 |",
        "| L_approx (Eq. 9) | not measured |",
        "| k nearest neighbours | 81.0 % | 93.1 % |",
        "| logistic regression | not measured | 95.5 % |",
        "![curves](curves.png)",
        "![step 400](pictures/step_400.png)",
    ):
        assert line in card.splitlines()
    assert "opened at step 130" in card
    assert recipe_in(card) == RECIPE


def test_what_was_not_measured_is_said_and_no_figure_appears(tmp_path):
    card = write_card(tmp_path, summary={"final": None, "seed": 17}, recipe={})
    assert "about labels was not measured" in card
    assert "Whether the information terms ever trained was not recorded" in card
    assert (
        "did not record: model, data, images, epochs, steps, processes, device, seconds, commit of the code, versions."
        in card
    )
    results = card.split("## Results")[1].split("## Not measured")[0]
    assert [line.split(" | ")[1] for line in results.splitlines() if line.endswith(" |")][1:] == ["not measured |"] * 5
    assert "%" not in results
    assert "![" not in card


@pytest.mark.parametrize(
    ("summary", "recipe", "sentence"),
    [
        (
            {"gate_opened_at_step": None, "gate_threshold": 0.5},
            {},
            "**The gate never opened:** L_rec did not fall below 0.5",
        ),
        ({"gate_opened_at_step": None, "gate_threshold": None}, {}, "trained from the first step"),
        ({"gate_opened_at_step": 0, "gate_threshold": 0.5}, {}, "opened at step 0,"),
        (
            {"gate_opened_at_step": None, "gate_threshold": 0.5},
            {"mi_max_weight": 0.0, "mi_min_weight": 0},
            "have weight 0",
        ),
    ],
)
def test_the_card_says_in_words_what_became_of_the_gate(tmp_path, summary, recipe, sentence):
    card = write_card(tmp_path, summary=summary, recipe=recipe)
    assert sentence in card
    assert ("never opened" in card) == ("never opened" in sentence)


def test_no_path_token_or_host_of_the_machine_reaches_the_card(tmp_path):
    secrets = {
        "output_dir": "runs/private-run",
        "cache_dir": "private-cache",
        "resume_from_checkpoint": "private-latest",
        "hub_token": "private-token",
        "train_dir": "/home/private/images",
        "validation_dir": tmp_path / "private",
        "config": "~/private/recipe.yaml",
        "labels": "C:\\private\\labels.txt",
        "data_files": ["/mnt/private/a.parquet", "hf://datasets/a/b/train.parquet", "../private/c.parquet"],
        "url": "https://private:private@private.lan/private/shard-01.tar?signature=private",
        "loader": {"root": "file:///private", "extra": "hf_" + "private" * 5, "flags": "--root=/private"},
    }
    card = write_card(tmp_path, {**SUMMARY, "dataset": "/home/private/images"}, RECIPE | secrets)
    assert "private" not in card
    assert str(tmp_path) not in card
    assert "- Data: on the machine of the run, not named here" in card.splitlines()
    kept = {"data_files": ["hf://datasets/a/b/train.parquet"], "url": "https://…/shard-01.tar", "loader": {}}
    expected = RECIPE | kept
    del expected["train_dir"]
    assert recipe_in(card) == expected


def test_a_picture_from_elsewhere_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"curves\.png lies outside"):
        write_card(tmp_path / "model", pictures=["../curves.png"])


def test_the_snippet_uses_the_repository_it_is_pushed_to(tmp_path):
    card = write_card(tmp_path, recipe=RECIPE | {"hub_model_id": "someone/mimae-digits"})
    assert "\n# mimae-digits\n" in card
    snippet = card.split("```python\n")[1].split("```")[0]
    compile(snippet, "card", "exec")
    assert 'checkpoint = "someone/mimae-digits"' in snippet


def model_index(folder):
    """Of the card: (data set's type, its name, its configuration, metric, its name, value)."""
    return [
        (
            found.dataset_type,
            found.dataset_name,
            found.dataset_config,
            found.metric_type,
            found.metric_name,
            found.metric_value,
        )
        for found in ModelCard.load(folder / "README.md").data.eval_results or []
    ]


def test_probes_are_in_the_model_index_and_nothing_is_where_none_was_made(tmp_path):
    write_card(tmp_path, summary=SUMMARY | {"dataset": "digits"})
    name = "on frozen features"
    assert model_index(tmp_path) == [
        ("someone/digits", "digits", None, "accuracy", f"k nearest neighbours {name}", 0.9312),
        ("someone/digits", "digits", None, "accuracy", f"logistic regression {name}", 0.955),
    ]
    write_card(tmp_path, summary={}, recipe={})
    assert "model-index" not in (tmp_path / "README.md").read_text()


def corruption_errors(**more):
    errors = {"gaussian_noise": 0.5, "fog": 0.25}
    rows = {name: {"error": error, "error_by_severity": [error] * 5} for name, error in errors.items()}
    return {"severities": [1, 2, 3, 4, 5], "per_corruption": rows, "mean_error": 0.375, **more}


RESULTS = {
    "task": "finetune",
    "dataset": "/home/private/beans",
    "metrics": {"accuracy": 0.97, "loss": 0.125, "balanced_accuracy": 0.5},
    "robustness": {
        "imagenet_a": {"accuracy": 0.374, "top5_accuracy": 0.6},
        "imagenet_c": corruption_errors(mce=49.52),
        "corruptions": corruption_errors(),
    },
    "recipe": {
        "model_name_or_path": "someone/mimae-beans",
        "dataset_name": "someone/beans",
        "hub_model_id": "someone/beans",
        "hub_token": "hf_" + "private" * 5,
        "train_dir": "/home/private/beans",
    },
    "seed": 3,
    "commit": None,
    "hardware": {"device": "CPU, 2 threads", "world_size": 1},
    "versions": {"torch": "2.11.0"},
}


def write_classifier_card(folder, **changes):
    return write_classification_card(folder, results=RESULTS | changes, pictures=["confusion.png"]).read_text()


def test_a_classifiers_card_gives_its_figures(tmp_path):
    card = write_classifier_card(tmp_path)
    for line in (
        "# beans",
        "- Data: on the machine of the run, not named here",
        "- Starting point: someone/mimae-beans",
        "- Seed: 3",
        "- Hardware: device CPU, 2 threads, world_size 1",
        "| top-1 accuracy | 97.0 % |",
        "| top-5 accuracy | not measured |",
        "| loss | 0.125 |",
        "| balanced_accuracy | 50.0 % |",
        "| ImageNet-A | 37.4 % | 60.0 % |",
        "| gaussian noise | 50.0 % |",
        "| **mean** | 37.5 % |",
        "| **mCE (AlexNet: 100)** | 49.5 |",
        "![confusion](confusion.png)",
        "- The run did not record: model, held-out images, commit of the code.",
    ):
        assert line in card.splitlines(), line
    assert card.count("mCE") == 2  # in the table of ImageNet-C and in its model-index, not in that of other images
    assert "- Robustness" not in card
    assert "private" not in card
    assert "\n\n\n" not in card


def test_a_classifiers_figures_are_in_the_model_index(tmp_path):
    write_classifier_card(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.pipeline_tag, data.base_model, data.datasets) == (
        "image-classification",
        ["someone/mimae-beans"],
        ["someone/beans"],
    )
    own, mce = ("someone/beans", "images not named here"), "mCE (AlexNet: 100)"
    assert model_index(tmp_path) == [
        (*own, None, "accuracy", "top-1 accuracy", 0.97),
        ("imagenet_a", "ImageNet-A", None, "accuracy", "top-1 accuracy", 0.374),
        ("imagenet_a", "ImageNet-A", None, "accuracy", "top-5 accuracy", 0.6),
        ("imagenet_c", "ImageNet-C", None, "error", "mean error", 0.375),
        ("imagenet_c", "ImageNet-C", None, "mce", mce, 49.52),
        (*own, "corrupted", "error", "mean error", 0.375),
    ]


def test_a_classifiers_card_says_what_was_not_measured(tmp_path):
    card = write_classification_card(tmp_path, results={"task": "linear_probe"}, pictures=[]).read_text()
    assert "a linear classifier on the frozen features" in card
    assert "- Robustness: how the model fares" in card
    assert "did not record: model, starting point, data, held-out images, seed, hardware, commit" in card
    assert "%" not in card
    assert "model-index" not in card


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"untrained": True}, "random weights"),
        ({"recipe": {"preset": "vit-tiny"}}, "random weights"),
        ({"recipe": {"model_name_or_path": "/home/private/run"}}, "on the machine of the run, not named here"),
    ],
)
def test_a_card_claims_no_pretrained_encoder_where_there_was_none(tmp_path, changes, start):
    card = write_classifier_card(tmp_path, **changes)
    assert f"- Starting point: {start}" in card.splitlines()
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


@pytest.mark.parametrize("task", ["knn", "evaluate", None])
def test_a_task_that_leaves_no_classifier_gets_no_card(tmp_path, task):
    with pytest.raises(ValueError, match="leaves no classifier"):
        write_classifier_card(tmp_path, task=task)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("revision", "argument"), [(None, ""), ("stock", ', revision="stock"')])
def test_a_backbones_card_loads_it_without_remote_code_and_names_its_model(tmp_path, revision, argument):
    stock = FAMILIES["mimae"].stock
    card = write_backbone_card(
        tmp_path, stock=stock, base_model="someone/digits", checkpoint="someone/there", revision=revision
    ).read_text()
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "someone/digits"
    assert 'checkpoint = "someone/there"\n' in card
    assert f"AutoModel.from_pretrained(checkpoint{argument}, add_pooling_layer=False)" in card
    assert "trust_remote_code" not in card


EXAMPLES = Path(__file__).parents[1] / "model_cards" / "examples"


def test_the_example_has_the_form_of_what_a_run_writes_today(tmp_path):
    def form(folder):
        """Headings, names in tables, pictures and code: what does not differ between runs."""
        card = re.sub(r"<details>.*?</details>", "", (folder / "README.md").read_text(), flags=re.DOTALL)
        return [
            line.rsplit(" | ", 1)[0] for line in card.splitlines() if re.match(r"#|\||!\[|from|model|output|- A", line)
        ]

    assert pretrain(tmp_path, max_train_steps=2, hub_model_id="someone/mimae-digits-example") == 0
    written, example = form(tmp_path), form(EXAMPLES / "digits")
    assert len(written) > 20
    assert [re.sub(r"[\d.]+ %", "", line) for line in example] == [re.sub(r"[\d.]+ %", "", line) for line in written]
    for name in ("reconstructions.png", "curves.png"):
        assert (EXAMPLES / "digits" / name).stat().st_size > 1000


def test_the_commit_of_a_result_is_dirty_when_code_differs_and_not_when_documents_do(tmp_path):
    assert source_commit(tmp_path) is None
    git = partial(subprocess.run, check=True, cwd=tmp_path, capture_output=True, text=True)
    (tmp_path / "docs").mkdir()
    files = [tmp_path / name for name in ("README.md", "docs/results.jsonl", "masking.py")]
    for file in files:
        file.write_text("one\n")
    git(["git", "init", "--quiet"])
    git(["git", "add", "."])
    git(["git", "-c", "user.name=a", "-c", "user.email=a@example.com", "commit", "--quiet", "--message", "one"])
    commit = git(["git", "rev-parse", "HEAD"]).stdout.strip()
    for file, expected in zip(files, (commit, commit, f"{commit}-dirty"), strict=True):
        file.write_text("two\n")
        assert source_commit(tmp_path) == expected
