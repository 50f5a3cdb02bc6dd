"""Model cards: made from a run's recipe and its metrics, and from nothing else. Their texts lie in `model_cards`."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..families.family import StockModel
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
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

LOSS_NAMES = {name: f"{term.symbol} ({term.source})" for name, term in loss_terms_of(MIMForPreTrainingOutput).items()}
PROBE_NAMES = {"knn_accuracy": "k nearest neighbours", "linear_accuracy": "logistic regression"}
METRIC_NAMES = {"accuracy": "top-1 accuracy", "top5_accuracy": "top-5 accuracy", "loss": "loss"}
MCE_NAME = "mCE (AlexNet: 100)"
TEST_SET_NAMES = {
    "imagenet_a": "ImageNet-A",
    "imagenet_r": "ImageNet-R",
    "imagenet_sketch": "ImageNet-Sketch",
    "imagenet_c": "ImageNet-C",
    "corruptions": "the held-out images, corrupted on the fly",
}
# the tasks of the classification script that leave a classifier
CLASSIFIERS = ("finetune", "linear_probe")
# the Hub's name of a dense task, and the metrics that every run measures, with the names they are shown by
DENSE_TASKS = {
    "segmentation": ("image-segmentation", {"mean_iou": "mIoU", "mean_accuracy": "mAcc", "overall_accuracy": "aAcc"}),
    "detection": ("object-detection", {"box_ap": "box AP", "mask_ap": "mask AP"}),
}

# (what the images are, if not the run's own, for `EvalResult`; metric; its name in words; value)
Figure = tuple[Mapping[str, str], str, str, float | None]


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
    losses = {**LOSS_NAMES, "reconstruction_loss": family_named(summary.get("model_type")).words.reconstruction}
    final = summary.get("final") or {}
    before, after = summary.get("probe_before") or {}, summary.get("probe_after") or {}
    return _write_run_card(
        folder,
        "pretraining.md",
        {**summary, "recipe": recipe},
        pictures,
        pipeline_tag="image-feature-extraction",
        tags=["masked-image-modeling", "self-supervised"],
        figures=[
            ({}, "accuracy", f"{PROBE_NAMES.get(key, key)} on frozen features", value) for key, value in after.items()
        ],
        losses=[(losses.get(key, key), final.get(key)) for key in {**losses, **final}],
        probes=[(PROBE_NAMES.get(key, key), before.get(key), after.get(key)) for key in {**before, **after}],
    )


def write_classification_card(
    folder: str | os.PathLike[str], *, results: Mapping[str, Any], pictures: list[str]
) -> Path:
    """As `write_model_card`, for a classifier.

    Args:
        results: `results.json` of a run: `task` ("finetune" or "linear_probe"), and, all optional, `model_type`,
            `dataset`, `test_images` (how many), `metrics` (`accuracy` and `top5_accuracy` as fractions, `loss`, and
            others by name), `robustness` (`imagenet_a`, `imagenet_r` and `imagenet_sketch`, each with metrics of its
            own; `imagenet_c`, and `corruptions` made on the fly, each as `corruption_table` of `evaluation.robustness`
            returns it), `recipe`, `untrained` (`True`: the checkpoint gave its sizes alone), `seed`, `commit`,
            `hardware` and `versions` (dicts).

    Raises:
        ValueError: a task that leaves no classifier, or a picture that lies outside `folder`.
    """
    if results.get("task") not in CLASSIFIERS:
        raise ValueError(
            f"task {results.get('task')!r} leaves no classifier to write a card for; {' and '.join(CLASSIFIERS)} do"
        )
    metrics, robustness = results.get("metrics") or {}, results.get("robustness") or {}
    tables = {key: found for key, found in robustness.items() if "per_corruption" in found}
    test_sets = {key: found for key, found in robustness.items() if key not in tables}
    figures = _accuracies({}, metrics)
    for key, found in test_sets.items():
        figures += _accuracies(_test_set(key), found)
    for key, found in tables.items():
        images = {"dataset_config": "corrupted"} if key == "corruptions" else _test_set(key)
        figures += [(images, "error", "mean error", found["mean_error"]), (images, "mce", MCE_NAME, found.get("mce"))]
    config = Path(folder) / "config.json"
    return _write_run_card(
        folder,
        "classification.md",
        {**results, "start": _start(results)},
        pictures,
        pipeline_tag="image-classification",
        tags=["image-classification"],
        figures=figures,
        is_grey=config.is_file() and json.loads(config.read_text("utf-8")).get("num_channels") == 1,
        metrics=[
            (METRIC_NAMES.get(key, key), (_percent if key.endswith("accuracy") else _text)(metrics.get(key)))
            for key in {**METRIC_NAMES, **metrics}
        ],
        test_sets=[(TEST_SET_NAMES.get(key, key), found) for key, found in test_sets.items()],
        corruption_tables=[(TEST_SET_NAMES[key], found) for key, found in tables.items()],
        mce_name=MCE_NAME,
    )


def write_dense_card(folder: str | os.PathLike[str], *, results: Mapping[str, Any], pictures: list[str]) -> Path:
    """As `write_model_card`, for a model of segmentation or detection.

    Args:
        results: `results.json` of a run: `task` ("segmentation" or "detection"), and, all optional, `metrics`
            (fractions by name), and what `write_classification_card` takes beside its own metrics.

    Raises:
        ValueError: another task, or a picture that lies outside `folder`.
    """
    task, metrics = results.get("task"), results.get("metrics") or {}
    if task not in DENSE_TASKS:
        raise ValueError(f"task {task!r} is not dense; {' and '.join(DENSE_TASKS)} are")
    pipeline_tag, names = DENSE_TASKS[task]
    figures: list[Figure] = [
        ({}, key, names.get(key, key.replace("_", " ")), metrics.get(key)) for key in {**names, **metrics}
    ]
    return _write_run_card(
        folder,
        "dense.md",
        {**results, "start": _start(results)},
        pictures,
        pipeline_tag=pipeline_tag,
        tags=[task],
        figures=figures,
        task_type=pipeline_tag,
        library_name="mimae",  # no code lies beside the weights
        metrics=[(name, value) for _, _, name, value in figures],
    )


def write_backbone_card(
    folder: str | os.PathLike[str], *, stock: StockModel, base_model: str, checkpoint: str, revision: str | None = None
) -> Path:
    """Write `folder/README.md` for the stock encoder that was exported from a model, and return its path.

    Args:
        base_model: the repository of the model that it is the encoder of.
        checkpoint, revision: the repository that the card will lie in, and the branch of it, if not the main one.
    """
    return _write(
        folder,
        "backbone.md",
        _card_data("image-feature-extraction", [stock.format, "self-supervised"], base_model=base_model),
        title=f"{base_model.rpartition('/')[2]}, the encoder",
        checkpoint=checkpoint,
        base_model=base_model,
        stock=stock,
        revision_argument=f', revision="{revision}"' if revision else "",
    )


def _write_run_card(
    folder: str | os.PathLike[str],
    template: str,
    results: Mapping[str, Any],
    pictures: list[str],
    *,
    pipeline_tag: str,
    tags: list[str],
    figures: Iterable[Figure],
    task_type: str = "image-classification",
    library_name: str = "transformers",
    **shown: Any,
) -> Path:
    """A card with what is common to those of all runs; what was not measured is left out of its model-index.

    Args:
        results: of the run, with its `recipe`; of a downstream task, with its `start`.
        figures: of the model-index.
        task_type: of the figures.
        shown: what the template shows besides.
    """
    folder, recipe = Path(folder), public(results.get("recipe") or {})
    title = (recipe.get("hub_model_id") or results.get("model_type") or "mimae").rpartition("/")[2]
    datasets = _hub_names(recipe.get("dataset_name"))
    name = public(results.get("dataset")) or "images not named here"
    own: dict[str, Any] = {
        "dataset_name": name,
        "dataset_type": datasets[0] if datasets else re.sub(r"[^\w/.-]+", "-", name),
    }
    eval_results = [
        EvalResult(
            task_type=task_type,
            metric_type=metric,
            metric_name=metric_name,
            metric_value=round(value, 4),
            **{**own, **images},
        )
        for images, metric, metric_name, value in figures
        if value is not None
    ]
    return _write(
        folder,
        template,
        _card_data(
            pipeline_tag,
            tags,
            library_name,
            datasets=datasets,
            base_model=_hub_names(results.get("start")),
            model_name=title if eval_results else None,
            eval_results=list(eval_results) or None,
        ),
        title=title,
        checkpoint=recipe.get("hub_model_id") or "REPOSITORY_OR_FOLDER_OF_THIS_CARD",
        words=family_named(results.get("model_type")).words,
        results=results,
        recipe=recipe,
        recipe_text=yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).strip(),
        pictures=[(PurePath(picture).stem.replace("_", " "), _inside(folder, picture)) for picture in pictures],
        **shown,
    )


def _card_data(pipeline_tag: str, tags: list[str], library_name: str = "transformers", **more: Any) -> ModelCardData:
    return ModelCardData(
        license="apache-2.0", library_name=library_name, pipeline_tag=pipeline_tag, tags=["mimae", *tags], **more
    )


def _write(folder: str | os.PathLike[str], template: str, card_data: ModelCardData, **values: Any) -> Path:
    functions = {"percent": _percent, "public": public, "text": _text}
    text = TEMPLATES.get_template(template).render(card_data=card_data.to_yaml(), **functions, **values)
    partial, path = Path(folder) / ".README.md.partial", Path(folder) / "README.md"
    # blocks that a card leaves empty leave blank lines
    partial.write_text(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def _hub_names(name: Any) -> list[str] | None:
    is_on_hub = isinstance(name, str) and HUB_NAME.fullmatch(name) and not Path(name).exists()
    return [name] if is_on_hub else None


def _start(results: Mapping[str, Any]) -> str | None:
    """The checkpoint that the encoder came from; `None` if that was not recorded."""
    recipe = results.get("recipe")
    if recipe is None:
        return None
    is_pretrained = recipe.get("model_name_or_path") and not results.get("untrained")
    return recipe["model_name_or_path"] if is_pretrained else "random weights"


def _test_set(key: str) -> dict[str, str]:
    return {"dataset_name": TEST_SET_NAMES.get(key, key), "dataset_type": key}


def _accuracies(images: Mapping[str, str], metrics: Mapping[str, float]) -> list[Figure]:
    return [(images, "accuracy", METRIC_NAMES[key], metrics.get(key)) for key in ("accuracy", "top5_accuracy")]


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
