"""The model card of a pre-training run, made from its recipe and its metrics and from nothing else."""

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlsplit

import yaml
from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = Path(__file__).parent.parent / "model_cards" / "pretraining.md"
NOT_MEASURED = "not measured"
WITHHELD = "on the machine of the run, not named here"

# Where a run lay on its machine tells nothing about the model; tokens are nobody's business.
PRIVATE_KEYS = re.compile(r"output_dir|logging_dir|cache_dir|resume_from_checkpoint|.*token|.*password|.*secret")
LOCAL_PATH = re.compile(r"""(?:^|[\s=,;:"'(\[])(?:~\w*/|\.\.[/\\]|/(?=[^/\s])|[A-Za-z]:[/\\]|\\\\|file:)""")
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

LOSS_NAMES = {
    "loss": "loss (objective + L_approx)",
    "objective": "objective (Eq. 11)",
    "reconstruction_loss": "L_rec (Eq. 1)",
    "mi_max_loss": "L_max (Eq. 7, InfoNCE)",
    "mi_min_loss": "L_min (Eq. 10, CLUB bound)",
    "approximation_loss": "L_approx (Eq. 9)",
}
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
    "versions": "Versions",
}


def write_model_card(
    folder: str | os.PathLike, *, summary: Mapping[str, Any], recipe: Mapping[str, Any], pictures: list[str]
) -> Path:
    """Write `folder/README.md`. What `summary` lacks is said to be not measured; nothing is filled in.

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
    folder = Path(folder)
    recipe = _public(recipe)
    card_data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["mimae", "masked-image-modeling", "self-supervised"],
        datasets=_hub_datasets(recipe),
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=_title(recipe, summary),
        checkpoint=recipe.get("hub_model_id") or "REPOSITORY_OR_FOLDER_OF_THIS_CARD",
        facts=_facts(summary),
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip(),
        losses=_losses(summary.get("final") or {}),
        gate=_gate(summary, recipe),
        probes=_probes(summary.get("probe_before") or {}, summary.get("probe_after") or {}),
        pictures=[(PurePath(name).stem.replace("_", " "), _inside(folder, name)) for name in pictures],
        unrecorded=[name.lower() for key, name in FACT_NAMES.items() if summary.get(key) is None],
    )
    partial, path = folder / ".README.md.partial", folder / "README.md"
    partial.write_text(str(card), encoding="utf-8")
    partial.replace(path)
    return path


def _public(value: Any) -> Any:
    """`value` as plain YAML types, without what belongs to a machine or its user; `None` where nothing is left."""
    if isinstance(value, Mapping):
        shown = {key: item for key, item in value.items() if not PRIVATE_KEYS.fullmatch(key)}
        return {key: _public(item) for key, item in shown.items() if item is None or _public(item) is not None}
    if isinstance(value, list | tuple):
        return [item for item in map(_public, value) if item is not None]
    if isinstance(value, str | PurePath):
        return _public_text(str(value))
    return value


def _public_text(text: str) -> str | None:
    address = urlsplit(text) if "://" in text else None
    if address and address.scheme not in ("hf", "file"):
        # The host may be a private one, the query a signature.
        return f"{address.scheme}://…/{PurePath(address.path).name}"
    if LOCAL_PATH.search(text) or HUB_TOKEN.search(text):
        return None
    return text


def _hub_datasets(recipe: Mapping[str, Any]) -> list[str] | None:
    name = recipe.get("dataset_name")
    is_on_hub = isinstance(name, str) and HUB_NAME.fullmatch(name) and not Path(name).exists()
    return [name] if is_on_hub else None


def _title(recipe: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    return (recipe.get("hub_model_id") or summary.get("model_type") or "mimae").rpartition("/")[2]


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    known = {name: summary[key] for key, name in FACT_NAMES.items() if summary.get(key) is not None}
    return [(name, _text(_public(value)) if _public(value) is not None else WITHHELD) for name, value in known.items()]


def _losses(final: Mapping[str, float]) -> list[tuple[str, str]]:
    return [(LOSS_NAMES.get(key, key), _text(final.get(key))) for key in dict.fromkeys([*LOSS_NAMES, *final])]


def _gate(summary: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    if recipe.get("mi_max_weight") == 0 and recipe.get("mi_min_weight") == 0:
        return "The information terms have weight 0: this is a plain masked autoencoder."
    if "gate_opened_at_step" not in summary or "gate_threshold" not in summary:
        return "Whether the information terms ever trained was not recorded."
    opened, threshold = summary["gate_opened_at_step"], summary["gate_threshold"]
    if threshold is None:
        return "The gate was disabled: the information terms trained from the first step."
    if opened is None:
        return (
            f"**The gate never opened:** L_rec did not fall below {threshold:g}, so the information terms never "
            "trained, and the encoder is that of a masked autoencoder with several masks."
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
