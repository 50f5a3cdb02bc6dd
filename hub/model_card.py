"""Model cards: made from a run's recipe and its metrics, and from nothing else."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..families.family import CardWords, StockModel
from ..families.registry import family_named
from ..modeling_mim import MIMForPreTrainingOutput, loss_terms_of
from .privacy import public

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent.parent / "model_cards"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=False,
)
NOT_MEASURED = "not measured"
WITHHELD = "on the machine of the run, not named here"
NO_REPOSITORY_YET = "REPOSITORY_OR_FOLDER_OF_THIS_CARD"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

LOSS_NAMES = {name: f"{term.symbol} ({term.source})" for name, term in loss_terms_of(MIMForPreTrainingOutput).items()}
PROBE_NAMES = {"knn_accuracy": "k nearest neighbours", "linear_accuracy": "logistic regression"}
FACT_NAMES = {
    "model_type": "Model",
    "dataset": "Data",
    "num_images": "Images",
    "epochs": "Epochs",
    "steps": "Steps",
    "world_size": "Processes",
    "device": "Device",
    "seconds": "Seconds",
    "seed": "Seed",
    "commit": "Commit of the code",
    "versions": "Versions",
}

# how each task of the classification script that leaves a classifier makes it
MAKING = {
    "finetune": "a {encoder} and a linear head, trained together",
    "linear_probe": "a linear classifier on the frozen features of a {encoder}",
}
DOWNSTREAM_FACT_NAMES = {
    "model_type": "Model",
    "start": "Starting point",
    "dataset": "Data",
    "test_images": "Held-out images",
    "seed": "Seed",
    "hardware": "Hardware",
    "commit": "Commit of the code",
    "versions": "Versions",
}


@dataclass(frozen=True)
class DenseTask:
    """What a card says about a model for segmentation or detection.

    making: what it is, around its encoder.
    model_import: the line that gives its class, after `import mimae`.
    model_class: that class.
    output: a line of Python on the model's output.
    pipeline_tag: the Hub's name of the task.
    metrics: that every such run measures, with the names they are shown by; others are shown by their own.
    """

    making: str
    model_import: str
    model_class: str
    output: str
    pipeline_tag: str
    metrics: Mapping[str, str]


DENSE_TASKS = {
    "segmentation": DenseTask(
        "UperNet on a {encoder}, trained together: a class for each pixel",
        "from transformers import UperNetForSemanticSegmentation",
        "UperNetForSemanticSegmentation",
        "classes = model(pixel_values).logits.argmax(dim=1)  # (1, h, w), indices into model.config.id2label",
        "image-segmentation",
        {"mean_iou": "mIoU", "mean_accuracy": "mAcc", "overall_accuracy": "aAcc"},
    ),
    "detection": DenseTask(
        "Mask R-CNN on a {encoder}, trained together: boxes, classes and masks of objects",
        "from mimae.dense import MaskRCNNForInstanceSegmentation",
        "MaskRCNNForInstanceSegmentation",
        "objects = model(pixel_values).detections[0]  # boxes, scores, labels and masks, in pixels of pixel_values",
        "object-detection",
        {"box_ap": "box AP", "mask_ap": "mask AP"},
    ),
}
METRIC_NAMES = {"accuracy": "top-1 accuracy", "top5_accuracy": "top-5 accuracy", "loss": "loss"}
MCE_NAME = "mCE (AlexNet: 100)"
TEST_SET_NAMES = {
    "imagenet_a": "ImageNet-A",
    "imagenet_r": "ImageNet-R",
    "imagenet_sketch": "ImageNet-Sketch",
    "imagenet_c": "ImageNet-C",
    "corruptions": "the held-out images, corrupted on the fly",
}


def write_model_card(
    folder: str | os.PathLike[str], *, summary: Mapping[str, Any], recipe: Mapping[str, Any], pictures: list[str]
) -> Path:
    """Write `folder/README.md` for a pre-trained model. What `summary` lacks is reported as not measured.

    Local paths, tokens and the hosts of addresses outside the Hub are left out of the card.

    Args:
        folder: the model's folder.
        summary: what the run found, all optional: `model_type`, `dataset`, `num_images`, `steps`, `epochs`,
            `world_size`, `device`, `seconds`, `seed`, `versions` (a dict), `final` (loss name to value),
            `gate_opened_at_step` (`None`: never), `gate_threshold` (`None`: no gate), and `probe_before` and
            `probe_after` (metric to a fraction).
        recipe: the run's arguments; `hub_model_id` becomes the name in the usage snippet.
        pictures: PNG files in `folder`.

    Returns:
        The card's path.

    Raises:
        ValueError: a picture lies outside `folder`.
    """
    recipe = public(recipe)
    probe_after = summary.get("probe_after") or {}
    title = _title(recipe, summary.get("model_type"))
    words = family_named(summary.get("model_type")).words
    probe_figures = [
        ("accuracy", f"{PROBE_NAMES.get(key, key)} on frozen features", value) for key, value in probe_after.items()
    ]
    return _write(
        folder,
        "pretraining.md",
        _card_data(
            title,
            "image-feature-extraction",
            ["masked-image-modeling", "self-supervised"],
            datasets=_hub_names(recipe.get("dataset_name")),
            eval_results=_eval_results(_own_data(summary, recipe), probe_figures),
        ),
        title=title,
        words=words,
        **_record(folder, summary, FACT_NAMES, recipe, pictures),
        losses=_losses(summary.get("final") or {}, words),
        gate=_gate(summary, recipe, words),
        probes=_probes(summary.get("probe_before") or {}, probe_after),
    )


def write_classification_card(
    folder: str | os.PathLike[str], *, results: Mapping[str, Any], pictures: list[str]
) -> Path:
    """Write `folder/README.md` for a classifier. What `results` lacks is reported as not measured.

    Args:
        folder: the model's folder.
        results: `results.json` of a run: `task` ("finetune" or "linear_probe"), and, all optional, `model_type`,
            `dataset`, `test_images` (how many), `metrics` (`accuracy` and `top5_accuracy` as fractions, `loss`, and
            others by name), `robustness` (`imagenet_a`, `imagenet_r` and `imagenet_sketch`, each with metrics of its
            own; `imagenet_c`, and `corruptions` made on the fly, each as `corruption_table` of `evaluation.robustness`
            returns it), `recipe`, `untrained` (`True`: the checkpoint gave its sizes alone), `seed`, `commit`,
            `hardware` and `versions` (dicts).
        pictures: PNG files in `folder`.

    Returns:
        The card's path.

    Raises:
        ValueError: a task that leaves no classifier, or a picture that lies outside `folder`.
    """
    if results.get("task") not in MAKING:
        raise ValueError(
            f"task {results.get('task')!r} leaves no classifier to write a card for; {' and '.join(MAKING)} do"
        )
    recipe, start = public(results.get("recipe") or {}), _start(results)
    title, words = _title(recipe, results.get("model_type")), family_named(results.get("model_type")).words
    metrics, (test_sets, corruption_tables) = results.get("metrics") or {}, _robustness(results)
    return _write(
        folder,
        "classification.md",
        _card_data(
            title,
            "image-classification",
            ["image-classification"],
            datasets=_hub_names(recipe.get("dataset_name")),
            base_model=_hub_names(start),
            eval_results=_classification_results(results, recipe),
        ),
        title=title,
        making=MAKING[results["task"]].format(encoder=words.encoder),
        is_grey=_is_grey(Path(folder)),
        crop=_crop(recipe.get("evaluation_crop_ratio")),
        **_record(folder, {**results, "start": start}, DOWNSTREAM_FACT_NAMES, recipe, pictures),
        metrics=[(METRIC_NAMES.get(key, key), _figure(key, metrics.get(key))) for key in {**METRIC_NAMES, **metrics}],
        test_sets=[
            (TEST_SET_NAMES.get(key, key), _percent(found.get("accuracy")), _percent(found.get("top5_accuracy")))
            for key, found in test_sets.items()
        ],
        corruption_tables=[(TEST_SET_NAMES[key], _corruptions(table)) for key, table in corruption_tables.items()],
    )


def write_dense_card(folder: str | os.PathLike[str], *, results: Mapping[str, Any], pictures: list[str]) -> Path:
    """Write `folder/README.md` for a model of segmentation or detection. What `results` lacks is not measured.

    Args:
        folder: the model's folder.
        results: `results.json` of a run: `task` ("segmentation" or "detection"), and, all optional, `metrics`
            (fractions by name), and what `write_classification_card` takes beside its own metrics.
        pictures: PNG files in `folder`.

    Returns:
        The card's path.

    Raises:
        ValueError: another task, or a picture that lies outside `folder`.
    """
    if results.get("task") not in DENSE_TASKS:
        raise ValueError(f"task {results.get('task')!r} is not dense; {' and '.join(DENSE_TASKS)} are")
    task, metrics = DENSE_TASKS[results["task"]], results.get("metrics") or {}
    recipe, start = public(results.get("recipe") or {}), _start(results)
    title, words = _title(recipe, results.get("model_type")), family_named(results.get("model_type")).words
    figures = [
        (key, task.metrics.get(key, key.replace("_", " ")), metrics.get(key)) for key in {**task.metrics, **metrics}
    ]
    return _write(
        folder,
        "dense.md",
        _card_data(
            title,
            task.pipeline_tag,
            [results["task"]],
            library_name="mimae",  # no code lies beside the weights
            datasets=_hub_names(recipe.get("dataset_name")),
            base_model=_hub_names(start),
            eval_results=_eval_results(_own_data(results, recipe), figures, task.pipeline_tag),
        ),
        title=title,
        making=task.making.format(encoder=words.encoder),
        task=task,
        **_record(folder, {**results, "start": start}, DOWNSTREAM_FACT_NAMES, recipe, pictures),
        metrics=[(name, _percent(value)) for _, name, value in figures],
    )


def _is_grey(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text("utf-8")).get("num_channels") == 1


def _crop(ratio: float | None) -> str:
    """A note on the crop: the processor saved with the model does not crop, so its figures will differ."""
    if ratio in (None, 1):
        return ""
    return f", of which the middle {100 * ratio:g} % of each side was seen (the image processor takes all of it)"


def write_backbone_card(
    folder: str | os.PathLike[str], *, stock: StockModel, base_model: str, checkpoint: str, revision: str | None = None
) -> Path:
    """Write `folder/README.md` for the stock encoder that was exported from a model.

    Args:
        folder: the exported model's folder.
        stock: what it is.
        base_model: the repository of the model that it is the encoder of.
        checkpoint, revision: the repository that the card will lie in, and the branch of it, if not the main one.

    Returns:
        The card's path.
    """
    title = f"{base_model.rpartition('/')[2]}, the encoder"
    return _write(
        folder,
        "backbone.md",
        _card_data(title, "image-feature-extraction", [stock.format, "self-supervised"], base_model=base_model),
        title=title,
        checkpoint=checkpoint,
        base_model=base_model,
        stock=stock,
        revision_argument=f', revision="{revision}"' if revision else "",
    )


def _card_data(
    model_name: str,
    pipeline_tag: str,
    tags: list[str],
    eval_results: Sequence[EvalResult] = (),
    library_name: str = "transformers",
    **fields: Any,
) -> ModelCardData:
    return ModelCardData(
        license="apache-2.0",
        library_name=library_name,
        pipeline_tag=pipeline_tag,
        tags=["mimae", *tags],
        model_name=model_name if eval_results else None,
        eval_results=list(eval_results) or None,
        **fields,
    )


def _write(folder: str | os.PathLike[str], template: str, card_data: ModelCardData, **values: Any) -> Path:
    text = TEMPLATES.get_template(template).render(card_data=card_data.to_yaml(), **values)
    partial, path = Path(folder) / ".README.md.partial", Path(folder) / "README.md"
    # blocks that a card leaves empty leave blank lines
    partial.write_text(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def _record(
    folder: str | os.PathLike[str],
    values: Mapping[str, Any],
    fact_names: Mapping[str, str],
    recipe: Mapping[str, Any],
    pictures: list[str],
) -> dict[str, Any]:
    """What every card of a run shows."""
    known = {name: public(values[key]) for key, name in fact_names.items() if values.get(key) is not None}
    return {
        "checkpoint": recipe.get("hub_model_id") or NO_REPOSITORY_YET,
        "facts": [(name, WITHHELD if value is None else _text(value)) for name, value in known.items()],
        "unrecorded": [name.lower() for key, name in fact_names.items() if values.get(key) is None],
        "recipe": yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).strip(),
        "pictures": [(PurePath(name).stem.replace("_", " "), _inside(Path(folder), name)) for name in pictures],
    }


def _hub_names(name: Any) -> list[str] | None:
    is_on_hub = isinstance(name, str) and HUB_NAME.fullmatch(name) and not Path(name).exists()
    return [name] if is_on_hub else None


def _title(recipe: Mapping[str, Any], model_type: str | None) -> str:
    return (recipe.get("hub_model_id") or model_type or "mimae").rpartition("/")[2]


def _start(results: Mapping[str, Any]) -> str | None:
    """The checkpoint that the encoder came from; `None` if that was not recorded."""
    recipe = results.get("recipe")
    if recipe is None:
        return None
    is_pretrained = recipe.get("model_name_or_path") and not results.get("untrained")
    return recipe["model_name_or_path"] if is_pretrained else "random weights"


def _own_data(values: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, str]:
    """The run's own data in a model-index; their type is the Hub's name for them, if there is one."""
    name = public(values.get("dataset")) or "images not named here"
    hub_names = _hub_names(recipe.get("dataset_name"))
    return {"dataset_name": name, "dataset_type": hub_names[0] if hub_names else re.sub(r"[^\w/.-]+", "-", name)}


def _eval_results(
    data: dict[str, Any], figures: list[tuple[str, str, float | None]], task_type: str = "image-classification"
) -> list[EvalResult]:
    """Entries of a model-index from (metric, its name in words, value); what was not measured is left out."""
    return [
        EvalResult(
            task_type=task_type,
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 4),
            **data,
        )
        for metric, name, value in figures
        if value is not None
    ]


def _robustness(results: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics of other test sets, and the tables of corruption errors."""
    found = results.get("robustness") or {}
    tables = {key: value for key, value in found.items() if "per_corruption" in value}
    return {key: value for key, value in found.items() if key not in tables}, tables


def _classification_results(results: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[EvalResult]:
    data, (test_sets, corruption_tables) = _own_data(results, recipe), _robustness(results)
    found = _eval_results(data, _accuracies(results.get("metrics") or {}))
    for key, metrics in test_sets.items():
        found += _eval_results(_test_set(key), _accuracies(metrics))
    for key, table in corruption_tables.items():
        images = {**data, "dataset_config": "corrupted"} if key == "corruptions" else _test_set(key)
        figures = [("error", "mean error", table["mean_error"]), ("mce", MCE_NAME, table.get("mce"))]
        found += _eval_results(images, figures)
    return found


def _test_set(key: str) -> dict[str, str]:
    return {"dataset_name": TEST_SET_NAMES.get(key, key), "dataset_type": key}


def _accuracies(metrics: Mapping[str, float]) -> list[tuple[str, str, float | None]]:
    return [("accuracy", METRIC_NAMES[key], metrics.get(key)) for key in ("accuracy", "top5_accuracy")]


def _corruptions(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(name.replace("_", " "), _percent(found["error"])) for name, found in table["per_corruption"].items()]
    rows.append(("**mean**", _percent(table["mean_error"])))
    return [*rows, (f"**{MCE_NAME}**", f"{table['mce']:.1f}")] if "mce" in table else rows


def _figure(metric: str, value: float | None) -> str:
    return _percent(value) if metric.endswith("accuracy") else _text(value)


def _losses(final: Mapping[str, float], words: CardWords) -> list[tuple[str, str]]:
    names = {**LOSS_NAMES, "reconstruction_loss": words.reconstruction}
    return [(names.get(key, key), _text(final.get(key))) for key in dict.fromkeys([*names, *final])]


def _gate(summary: Mapping[str, Any], recipe: Mapping[str, Any], words: CardWords) -> str:
    if recipe.get("mi_max_weight") == 0 and recipe.get("mi_min_weight") == 0:
        return f"The information terms have weight 0: this is {words.baseline} and nothing else."
    if "gate_opened_at_step" not in summary or "gate_threshold" not in summary:
        return "Whether the information terms ever trained was not recorded."
    opened, threshold = summary["gate_opened_at_step"], summary["gate_threshold"]
    if threshold is None:
        return "The gate was disabled: the information terms trained from the first step."
    if opened is None:
        return (
            f"**The gate never opened:** L_rec did not fall below {threshold:g}, so the information terms never "
            f"trained, and the encoder is that of {words.baseline} with several masks."
        )
    return f"The gate opened at step {opened}, when L_rec fell below {threshold:g}; until then L_rec trained alone."


def _probes(before: Mapping[str, float], after: Mapping[str, float]) -> list[tuple[str, str, str]]:
    keys = dict.fromkeys([*before, *after])
    return [(PROBE_NAMES.get(key, key), _percent(before.get(key)), _percent(after.get(key))) for key in keys]


def _percent(fraction: float | None) -> str:
    return NOT_MEASURED if fraction is None else f"{100 * fraction:.1f} %"


def _text(value: Any) -> str:
    if value is None:
        return NOT_MEASURED
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _inside(folder: Path, picture: str) -> str:
    path = folder / picture
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"the picture {picture} lies outside {folder}: put it there first, or the card cannot show it"
        )
    return path.resolve().relative_to(folder.resolve()).as_posix()
