"""Recipe and flags become dataclasses. Flags win; an unknown key or a wrong type is refused by name."""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser, PreTrainedConfig

from ..data.arguments import DATA_KEYS, PLACES, check_types


class RecipeError(ValueError):
    """A recipe or a flag that cannot be used; the message names the key."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which model is trained. Every field of the model's configuration is a flag and a recipe key, too."""

    model_type: str = _option("mimae", "The model: mimae.")
    preset: str | None = _option(
        None, "Size: vit-tiny, vit-small, vit-base, vit-large or vit-huge; fields win over it."
    )
    model_name_or_path: str | None = _option(
        None, "Start from this checkpoint's weights: one of this project's, or any ViTMAE's. The recipe's values win."
    )
    attn_implementation: str | None = _option(None, "sdpa, eager or flash_attention_2; default: transformers' choice.")
    gradient_checkpointing: bool = _option(False, "Recompute activations in the backward pass, to save memory.")

    def __post_init__(self):
        check_types(self)


@dataclass
class PretrainingArguments:
    """Optimisation (Sec. 5.1 and the official MAE's recipe), state on disk, and what is shown."""

    output_dir: str | None = _option(
        None, "Where everything goes; default: in outputs/, by the recipe, numbered if taken."
    )
    overwrite_output_dir: bool = _option(False, "Delete the run that output_dir holds.")
    resume_from_checkpoint: str | None = _option(None, "latest (the newest valid one in output_dir), or a path.")
    seed: int = _option(0, "Initialisation, order of samples, augmentation and masks follow from it.")

    per_device_train_batch_size: int = _option(64, "Images per process and forward pass.")
    gradient_accumulation_steps: int = _option(1, "Forward passes per optimiser step.")
    num_train_epochs: float = _option(200.0, "Passes over the images.")
    max_train_steps: int | None = _option(None, "Optimiser steps; wins over num_train_epochs.")
    base_learning_rate: float = _option(1.5e-4, "lr = base_learning_rate * batch / lr_base_batch.")
    lr_batch_unit: Literal["views", "images"] = _option("views", "What the batch counts in the lr rule.")
    lr_base_batch: int = _option(256, "See base_learning_rate; 256 for MAE, 512 for SimMIM.")
    min_learning_rate: float = _option(0.0, "Where the half-cosine ends.")
    warmup_epochs: float = _option(10.0, "Linear from 0.")
    weight_decay: float = _option(0.05, "On parameters with more than one dimension that are not biases.")
    adam_beta1: float = _option(0.9, "AdamW.")
    adam_beta2: float = _option(0.95, "AdamW.")
    max_grad_norm: float | None = _option(None, "Clip gradients at this norm, the approximator's on their own.")
    max_nonfinite_steps: int = _option(10, "Stop after so many steps in a row without a finite gradient.")

    image_mean: list[float] | None = _option(
        None, "Per channel, in 0..1; default: ImageNet's for 3 channels, else 0.5."
    )
    image_std: list[float] | None = _option(
        None, "Per channel, in 0..1; default: ImageNet's for 3 channels, else 0.5."
    )

    mixed_precision: Literal["no", "fp16", "bf16"] | None = _option(None, "Default: accelerate's.")
    torch_compile: bool = _option(False, "Compile the model; pays on a GPU.")
    use_cpu: bool = _option(False, "Train on the CPU even if there is a GPU.")
    cpu_threads: int | None = _option(
        None, "On a CPU, threads of all processes of a machine together; default: torch's, which accelerate sets to 1."
    )

    checkpointing_steps: int | None = _option(None, "Save every so many steps; wins over checkpointing_epochs.")
    checkpointing_epochs: float = _option(1.0, "Save every so many epochs.")
    checkpoints_total_limit: int | None = _option(3, "Keep the newest so many; at least 2.")
    logging_steps: int = _option(10, "Log every so many steps.")
    evaluation_steps: int | None = _option(None, "Draw pictures and probe every so many steps; wins over epochs.")
    evaluation_epochs: float = _option(10.0, "Draw pictures and probe every so many epochs.")
    probe_samples: int = _option(5000, "At most so many images to fit the probe on, and to test it; 0: no probe.")
    evaluation_crop_ratio: float = _option(0.875, "Images are probed resized to size / ratio and cropped; 1: whole.")
    report_to: str = _option("tensorboard", "Any Accelerate tracker, several with commas, or none.")

    def __post_init__(self):
        check_types(self)
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "lr_base_batch",
            "max_nonfinite_steps",
        ):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("max_train_steps", "checkpointing_steps", "evaluation_steps", "cpu_threads"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name}={value} must be at least 1")
        for name in ("num_train_epochs", "checkpointing_epochs", "evaluation_epochs", "base_learning_rate"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        for name in ("warmup_epochs", "probe_samples", "weight_decay", "min_learning_rate"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        _require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            f"max_grad_norm={self.max_grad_norm} must be positive; leave it out to clip nothing",
        )
        ratio = self.evaluation_crop_ratio
        _require(0 < ratio <= 1, f"evaluation_crop_ratio={ratio} must lie above 0 and at most at 1")
        limit = self.checkpoints_total_limit
        _require(limit is None or limit >= 2, f"checkpoints_total_limit={limit} must be at least 2")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A YAML mapping of flag names to values; plain data only, a YAML tag executes nothing.

    Raises:
        RecipeError: no such file, no YAML, or no mapping.
    """
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"recipe {path} must be a mapping of flag names to values, not {type(recipe).__name__}")
    return recipe


def config_fields(config_class: type[PreTrainedConfig]) -> list[str]:
    """The model configuration's own fields, without those that every transformers configuration has."""
    common = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    return [f.name for f in dataclasses.fields(config_class) if f.name not in common]


def parse_arguments(
    argv: Sequence[str] | None,
    groups: Sequence[type],
    config_class: type[PreTrainedConfig],
    default_recipe: Path,
    description: str,
) -> tuple[list[Any], dict[str, Any], Path]:
    """The recipe named by --config (or the default one) with the flags on top.

    Args:
        argv: the command line; None = the process's.
        groups: dataclasses whose fields are the flags.
        config_class: the model's configuration, whose fields are flags as well.

    Returns:
        One instance per group, the model configuration's fields that recipe or flags set, and the recipe's path.

    Raises:
        RecipeError: an unknown key or a wrong type in the recipe, or an unknown flag.
    """
    parser = HfArgumentParser(groups, description=description, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=default_recipe, help="A recipe: YAML of these flags' values.")
    model_group = parser.add_argument_group("model configuration", f"Fields of {config_class.__name__}.")
    for name in config_fields(config_class):
        model_group.add_argument(f"--{name}", type=_parse_value, default=argparse.SUPPRESS)

    recipe_path = _config_flag(argv, default_recipe)
    recipe = read_recipe(recipe_path)
    check_recipe(recipe, groups, config_class)
    fields = set(config_fields(config_class))
    if any(_is_given(argv, place) for place in PLACES):
        recipe = {key: value for key, value in recipe.items() if key not in DATA_KEYS}
    parser.set_defaults(**{key: value for key, value in recipe.items() if key not in fields})
    *instances, rest, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, args_file_flag=None
    )
    known = [action.dest for action in parser._actions]
    for flag in unknown[:1]:
        raise RecipeError(f"unknown flag {flag!r}{_did_you_mean(flag.lstrip('-').split('=')[0], known)}")
    overrides = {key: value for key, value in vars(rest).items() if key in fields}
    return instances, {**{k: v for k, v in recipe.items() if k in fields}, **overrides}, recipe_path


def check_recipe(recipe: dict[str, Any], groups: Sequence[type], config_class: type[PreTrainedConfig]) -> None:
    """Raises a RecipeError that names the key, where one is unknown or has a value of the wrong type.

    The model configuration's fields are checked by the configuration itself, when it is built.
    """
    known = [f.name for group in groups for f in dataclasses.fields(group)] + config_fields(config_class)
    for key in recipe:
        if key not in known:
            raise RecipeError(f"unknown key {key!r}{_did_you_mean(str(key), known)}")
    for group in groups:
        names = {f.name for f in dataclasses.fields(group)}
        try:
            group(**{key: value for key, value in recipe.items() if key in names})
        except RecipeError:
            raise
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{error}\n(YAML reads 2e-4 as text: write 2.0e-4)") from error


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _config_flag(argv: Sequence[str] | None, default: Path) -> Path:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=default)
    return parser.parse_known_args(argv)[0].config


def _is_given(argv: Sequence[str] | None, name: str) -> bool:
    arguments = sys.argv[1:] if argv is None else argv
    return any(argument.split("=")[0] == f"--{name}" for argument in arguments)


def _parse_value(text: str) -> Any:
    """A flag of the model configuration: a number, None, a list in brackets, or text; its type is checked there."""
    if text in ("None", "none"):
        return None
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return yaml.safe_load(text)
