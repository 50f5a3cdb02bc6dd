"""Recipe and flags become dataclasses. Flags win; an unknown key or a wrong type is refused by name."""

import argparse
import dataclasses
import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

import yaml
from transformers import HfArgumentParser, PreTrainedConfig

from ..data.arguments import DATA_KEYS, PLACES, check_types


class RecipeError(ValueError):
    """A recipe or a flag that cannot be used; the message names the key."""


def option(default: Any, text: str) -> Any:
    """A flag with its default and its help."""
    metadata = {"help": text.replace("%", "%%")}  # argparse fills in what a single one names
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    """Which model is trained. Every field of the models' configurations is a flag and a recipe key, too."""

    model_type: str | None = option(
        None, "mimae (on a ViT), or misimmim (on a Swin); default: in downstream tasks the checkpoint's, else mimae."
    )
    preset: str | None = option(
        None,
        "Size: vit-tiny, -small, -base, -large or -huge; swin-tiny, -small, -base or -large. Fields win over it.",
    )
    model_name_or_path: str | None = option(
        None,
        "Start from this checkpoint's weights: one of this project's, or a stock ViTMAE's; downstream also a ViT's; a "
        "Swin's where Swins are trained.",
    )
    attn_implementation: str | None = option(
        None,
        "sdpa, eager or flash_attention_2; default: transformers' choice; for pre-training in bf16 on a CPU made for "
        "it, matmul, whose backward pass is faster than that of sdpa and needs more memory.",
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass, to save memory.")

    def __post_init__(self):
        check_types(self)


@dataclass
class HubArguments:
    """Whether and where the result goes on the Hub. The token is huggingface_hub's: `hf auth login`, or HF_TOKEN."""

    push_to_hub: bool = option(
        False,
        "Upload the model and its card at the end; of what is no segmenter or detector, the encoder as stock ViT or "
        "Swin.",
    )
    hub_model_id: str | None = option(None, "The repository; default: output_dir's name, in your own namespace.")
    hub_private_repo: bool = option(False, "Make the repository private, if it is new.")

    def __post_init__(self):
        check_types(self)


@dataclass
class CheckedArguments:
    """Flags whose types and values are checked; the subclass names those that must lie in a common range."""

    AT_LEAST_1: ClassVar = ()
    POSITIVE: ClassVar = ()
    NOT_NEGATIVE: ClassVar = ()
    FRACTIONS: ClassVar = ()

    def __post_init__(self):
        check_types(self)
        self._check("at least 1", lambda value: value >= 1, *self.AT_LEAST_1)
        self._check("positive", lambda value: value > 0, *self.POSITIVE)
        self._check("0 or more", lambda value: value >= 0, *self.NOT_NEGATIVE)
        self._check("above 0 and at most 1", lambda value: 0 < value <= 1, *self.FRACTIONS)

    def _check(self, words: str, holds: Callable[[float], bool], *names: str) -> None:
        """Refuses the fields that are set and for which something does not hold."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise RecipeError(f"{name}={value} must be {words}")


@dataclass
class RunArguments(CheckedArguments):
    """What every training has: its folder, its batches, the machine, and how often something is kept or shown."""

    output_dir: str | None = option(
        None, "Where everything goes; default: in outputs/, by the recipe, numbered if taken."
    )
    overwrite_output_dir: bool = option(False, "Delete the run that output_dir holds.")
    resume_from_checkpoint: str | None = option(None, "latest (the newest valid one in output_dir), or a path.")
    seed: int = option(0, "Initialisation, order of samples and everything drawn at random follow from it.")

    per_device_train_batch_size: int = option(64, "Images per process and forward pass.")
    gradient_accumulation_steps: int = option(1, "Forward passes per optimiser step.")
    max_train_steps: int | None = option(None, "Optimiser steps; wins over num_train_epochs.")
    warmup_learning_rate: float = option(0.0, "Where the warm-up starts.")
    weight_decay: float = option(0.05, "On parameters with more than one dimension that are not biases.")
    max_grad_norm: float | None = option(None, "Clip gradients at this norm; pre-training, the approximator's apart.")

    image_mean: list[float] | None = option(
        None, "Per channel, in 0..1; default: the checkpoint's, else ImageNet's for 3 channels, else 0.5."
    )
    image_std: list[float] | None = option(
        None, "Per channel, in 0..1; default: the checkpoint's, else ImageNet's for 3 channels, else 0.5."
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "Default: accelerate's.")
    torch_compile: bool = option(False, "Compile the model; pays on a GPU.")
    use_cpu: bool = option(False, "Train on the CPU even if there is a GPU.")
    cpu_threads: int | None = option(
        None, "On a CPU, threads of all processes of a machine together; default: torch's, which accelerate sets to 1."
    )

    checkpointing_steps: int | None = option(None, "Save every so many steps; wins over checkpointing_epochs.")
    checkpointing_epochs: float = option(1.0, "Save every so many epochs.")
    checkpoints_total_limit: int | None = option(3, "Keep the newest so many; at least 2.")
    logging_steps: int = option(10, "Log every so many steps.")
    evaluation_steps: int | None = option(None, "Evaluate every so many steps; wins over evaluation_epochs.")
    evaluation_epochs: float = option(10.0, "Evaluate every so many epochs.")
    report_to: str = option("tensorboard", "Any Accelerate tracker, several with commas, or none.")

    def __post_init__(self):
        super().__post_init__()
        self._check("at least 2", lambda value: value >= 2, "checkpoints_total_limit")

    AT_LEAST_1: ClassVar = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "logging_steps",
        "max_train_steps",
        "checkpointing_steps",
        "evaluation_steps",
        "cpu_threads",
    )
    POSITIVE: ClassVar = ("checkpointing_epochs", "evaluation_epochs", "max_grad_norm")
    NOT_NEGATIVE: ClassVar = ("weight_decay", "warmup_learning_rate")


@dataclass
class CropArguments(RunArguments):
    """What every script has that tests on whole images of one size."""

    evaluation_crop_ratio: float = option(0.875, "Images are tested resized to size / ratio and cropped; 1: whole.")

    FRACTIONS: ClassVar = (*RunArguments.FRACTIONS, "evaluation_crop_ratio")


@dataclass
class PretrainingArguments(CropArguments):
    """Optimisation (Sec. 5.1 and the official MAE's recipe), and the probe that watches it."""

    num_train_epochs: float = option(200.0, "Passes over the images.")
    base_learning_rate: float = option(1.5e-4, "lr = base_learning_rate * batch / lr_base_batch.")
    lr_batch_unit: Literal["views", "images"] = option("views", "What the batch counts in the lr rule.")
    lr_base_batch: int = option(256, "See base_learning_rate; 256 for MAE, 512 for SimMIM.")
    lr_scheduler_type: Literal["cosine", "multistep"] = option(
        "cosine", "After the warm-up: a half-cosine, or steps down at lr_milestone_epochs."
    )
    min_learning_rate: float = option(0.0, "cosine: where it ends.")
    lr_milestone_epochs: list[float] | None = option(None, "multistep: the learning rate is multiplied by lr_gamma.")
    lr_gamma: float = option(0.1, "multistep: the factor.")
    warmup_epochs: float = option(10.0, "Linear from warmup_learning_rate.")
    warmup_steps: int | None = option(None, "The same in optimiser steps; wins over warmup_epochs.")
    adam_beta1: float = option(0.9, "AdamW.")
    adam_beta2: float = option(0.95, "AdamW.")
    max_nonfinite_steps: int = option(10, "Stop after so many steps in a row without a finite gradient.")
    crop_interpolation: Literal["bicubic", "bilinear"] = option("bicubic", "Of the random crop; SimMIM's is bilinear.")
    probe_samples: int = option(5000, "At most so many images to fit the probe on, and to test it; 0: no probe.")

    AT_LEAST_1: ClassVar = (*RunArguments.AT_LEAST_1, "lr_base_batch", "max_nonfinite_steps")
    POSITIVE: ClassVar = (*RunArguments.POSITIVE, "num_train_epochs", "base_learning_rate", "lr_gamma")
    NOT_NEGATIVE: ClassVar = (
        *RunArguments.NOT_NEGATIVE,
        "warmup_epochs",
        "warmup_steps",
        "probe_samples",
        "min_learning_rate",
    )

    def __post_init__(self):
        super().__post_init__()
        is_multistep = self.lr_scheduler_type == "multistep"
        if is_multistep != bool(self.lr_milestone_epochs):
            raise RecipeError(
                f"lr_scheduler_type={self.lr_scheduler_type!r} with lr_milestone_epochs={self.lr_milestone_epochs}: "
                "multistep needs milestones, and cosine has none"
            )
        self._check("positive numbers", lambda epochs: min(epochs) > 0, "lr_milestone_epochs")
        if is_multistep and self.min_learning_rate:
            raise RecipeError(f"min_learning_rate={self.min_learning_rate} is for cosine: leave it out")


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
    """The model configuration's own public fields, without those that every transformers configuration has."""
    common = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    return [f.name for f in dataclasses.fields(config_class) if f.name not in common and not f.name.startswith("_")]


def parse_arguments(
    argv: Sequence[str] | None,
    groups: Sequence[type],
    config_classes: Sequence[type[PreTrainedConfig]],
    default_recipe: Path,
    description: str,
    *,
    places: Sequence[str] = PLACES,
    data_keys: Collection[str] = DATA_KEYS,
) -> tuple[list[Any], dict[str, Any], Path]:
    """The recipe named by --config (or the default one) with the flags on top.

    Args:
        argv: the command line; None = the process's.
        groups: dataclasses whose fields are the flags.
        config_classes: the models' configurations, whose fields are flags as well.
        places, data_keys: a flag of the former replaces all of the latter that the recipe names.

    Returns:
        One instance per group, the model configuration's fields that recipe or flags set, and the recipe's path.

    Raises:
        RecipeError: an unknown key or a wrong type in the recipe, or an unknown flag.
    """
    parser = HfArgumentParser(groups, description=description, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=default_recipe, help="A recipe: YAML of these flags' values.")
    fields = _add_model_flags(parser, config_classes)

    recipe_path = Path(flag_value(argv, "config") or default_recipe)
    recipe = read_recipe(recipe_path)
    check_recipe(recipe, groups, fields)
    if any(flag_value(argv, place) is not None for place in places):
        recipe = {key: value for key, value in recipe.items() if key not in data_keys}
    if flag_value(argv, "preset") is not None:
        recipe.pop("model_name_or_path", None)
    parser.set_defaults(**{key: value for key, value in recipe.items() if key not in fields})
    *instances, rest, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, args_file_flag=None
    )
    known = [action.dest for action in parser._actions]
    for flag in unknown[:1]:
        name = flag.split("=")[0]  # what follows may be a token
        raise RecipeError(f"unknown flag {name!r}{_did_you_mean(name.lstrip('-'), known)}")
    overrides = {key: _one_or_all(value) for key, value in vars(rest).items() if key in fields}
    return instances, {**{k: v for k, v in recipe.items() if k in fields}, **overrides}, recipe_path


def _add_model_flags(parser: argparse.ArgumentParser, config_classes: Sequence[type[PreTrainedConfig]]) -> set[str]:
    """Adds the fields of the models' configurations as flags, those of all models first; returns their names."""
    fields_of = {config_class: config_fields(config_class) for config_class in config_classes}
    shared = [name for name in fields_of[config_classes[0]] if all(name in own for own in fields_of.values())]
    names = " and ".join(config_class.__name__ for config_class in config_classes)
    groups = [(f"fields of {names}", config_classes, shared)]
    for config_class, own in fields_of.items():
        alone = [name for name in own if name not in shared]
        groups.append((f"fields of {config_class.__name__} alone", [config_class], alone))
    for title, owners, members in groups:
        group = parser.add_argument_group(title)
        types = {f.name: f.type for f in dataclasses.fields(owners[0])}
        for name in members:
            takes_list = any(get_origin(hint) is list for hint in (types[name], *get_args(types[name])))
            defaults = dict.fromkeys(str(getattr(owner, name)) for owner in owners)
            group.add_argument(
                f"--{name}",
                type=_parse_value,
                nargs="+" if takes_list else None,
                default=argparse.SUPPRESS,
                help=f"Default: {' or '.join(defaults)}.",
            )
    return {name for _, _, members in groups for name in members}


def check_recipe(recipe: dict[str, Any], groups: Sequence[type], model_fields: Collection[str]) -> None:
    """Raises a RecipeError that names the key, where one is unknown or has a value of the wrong type.

    The model configuration's fields are checked by the configuration itself, when it is built.
    """
    known = [f.name for group in groups for f in dataclasses.fields(group)] + sorted(model_fields)
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


def as_argv(flags: Mapping[str, Any]) -> list[str]:
    """A command line that gives flags these values; a list gives its flag several."""
    argv = []
    for name, value in flags.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def flag_value(argv: Sequence[str] | None, name: str) -> str | None:
    """What the command line gives a flag, before anything is parsed; None where it is not there."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}")
    return getattr(parser.parse_known_args(argv)[0], name)


def _one_or_all(value: Any) -> Any:
    """`--image_size 224` is a number, `--image_size 224 192` a list; so is `--depths '[2]'`."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


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
