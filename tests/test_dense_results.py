"""What a dense run leaves for people: results, curves, and a card that says how to load the model."""

import json
from pathlib import Path

import pytest
from dense_helpers import save_segmenter
from huggingface_hub import ModelCard
from PIL import Image

from mimae.hub.model_card import write_dense_card
from mimae.jobs.downstream_results import write_dense_results
from mimae.pictures.curves import DETECTION_PANELS, SEGMENTATION_PANELS, save_curves

FACTS = {
    "task": "segmentation",
    "model_type": "mimae",
    "model": "someone/encoder",
    "dataset": "someone/streets",
    "untrained": False,
    "seed": 3,
    "hardware": {"device": "CPU", "processes": 1},
    "recipe": {
        "dataset_name": "someone/streets",
        "model_name_or_path": "someone/encoder",
        "hub_model_id": "someone/segmenter",
        "output_dir": "/home/private/run",
    },
}
SEGMENTED = {"mean_iou": 0.481, "mean_accuracy": 0.6, "overall_accuracy": 0.825}
DETECTED = {"box_ap": 0.512, "mask_ap": 0.455, "box_ap50": 0.7}


def log_metrics(folder: Path, *lines: dict) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_leaves_results_curves_and_a_card_with_its_pictures(tmp_path):
    log_metrics(tmp_path, {"step": 1, "loss": 2.0, "learning_rate": 1e-4}, {"step": 2, "eval_mean_iou": 0.48})
    Image.new("RGB", (4, 4)).save(tmp_path / "segmentations.png")
    words = write_dense_results(
        tmp_path,
        facts=FACTS,
        test_images=20,
        metrics=SEGMENTED,
        per_class={"road": 0.5, "sky": None},
        pictures=["segmentations.png"],
    )
    assert "segmentation by someone/encoder on someone/streets, 20 held-out images" in words
    assert "mean_iou                 0.481" in words
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["metrics"], results["per_class"]) == (SEGMENTED, {"road": 0.5, "sky": None})
    assert {"commit", "versions", "recipe"} <= results.keys()
    card = (tmp_path / "README.md").read_text()
    assert card.index("![segmentations](segmentations.png)") < card.index("![curves](curves.png)")


def test_a_segmenters_card_gives_its_figures_and_the_hub_can_read_it(tmp_path):
    card = write_dense_card(tmp_path, results={**FACTS, "metrics": SEGMENTED}, pictures=[]).read_text()
    for line in (
        "# segmenter",
        "UperNet on a ViT, trained together: a class for each pixel.",
        "| mIoU | 48.1 % |",
        "| aAcc | 82.5 % |",
        "- Starting point: someone/encoder",
        "from transformers import UperNetForSemanticSegmentation",
    ):
        assert line in card.splitlines(), line
    assert "private" not in card
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.pipeline_tag, data.base_model, data.datasets) == (
        "image-segmentation",
        ["someone/encoder"],
        ["someone/streets"],
    )
    assert [(result.task_type, result.metric_type, result.metric_value) for result in data.eval_results] == [
        ("image-segmentation", "mean_iou", 0.481),
        ("image-segmentation", "mean_accuracy", 0.6),
        ("image-segmentation", "overall_accuracy", 0.825),
    ]


def test_a_detectors_card_gives_average_precision_and_what_else_was_measured(tmp_path):
    facts = {**FACTS, "task": "detection"}
    card = write_dense_card(tmp_path, results={**facts, "metrics": DETECTED}, pictures=[]).read_text().splitlines()
    rows = [card.index(line) for line in ("| box AP | 51.2 % |", "| mask AP | 45.5 % |", "| box ap50 | 70.0 % |")]
    assert rows == sorted(rows)
    assert "from mimae.dense import MaskRCNNForInstanceSegmentation" in card
    without = write_dense_card(tmp_path, results={"task": "detection"}, pictures=[]).read_text()
    assert "| mask AP | not measured |" in without


def test_a_task_that_is_not_dense_has_no_such_card(tmp_path):
    with pytest.raises(ValueError, match="'finetune' is not dense; segmentation and detection are"):
        write_dense_card(tmp_path, results={"task": "finetune"}, pictures=[])


def test_the_cards_snippet_loads_the_model_and_runs(tmp_path):
    save_segmenter(tmp_path)
    recipe = {**FACTS["recipe"], "hub_model_id": None}
    card = write_dense_card(tmp_path, results={**FACTS, "recipe": recipe}, pictures=[]).read_text()
    snippet = card.split("```python\n")[1].split("```")[0]
    (line,) = [line for line in snippet.splitlines() if line.startswith("checkpoint = ")]
    scope = {"image": Image.new("RGB", (20, 30))}
    exec(snippet.replace(line, f"checkpoint = {str(tmp_path)!r}"), scope)
    assert scope["classes"].shape == (1, 16, 16)
    assert not scope["model"].training


@pytest.mark.parametrize("panels", [SEGMENTATION_PANELS, DETECTION_PANELS])
def test_every_metric_of_a_panel_has_a_line_of_its_own(tmp_path, monkeypatch, panels):
    names = {name for _, members in panels for name in members}
    log_metrics(tmp_path, {"step": 1, **dict.fromkeys(names, 1.0)}, {"step": 2, **dict.fromkeys(names, 2.0)})
    drawn = []
    monkeypatch.setattr("mimae.pictures.curves.save_figure", lambda figure, path, dpi: drawn.append(figure))
    save_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", panels=panels)
    (figure,) = drawn
    assert len(figure.axes) == len(panels)
    for axes, (_, members) in zip(figure.axes, panels, strict=True):
        assert len(axes.lines) == len({line.get_color() for line in axes.lines}) == len(members)
