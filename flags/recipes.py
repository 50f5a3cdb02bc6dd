"""Recipe and flags become dataclasses. Flags win; an unknown key or a wrong type is refused by name."""

import argparse
import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedConfig

from .model_fields import model_fields
from .option import RecipeError, flags_of
from .parser import FlagParser


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


def parse_arguments(
    argv: Sequence[str] | None,
    groups: Sequence[type],
    config_classes: Sequence[type[PreTrainedConfig]],
    default_recipe: Path,
    description: str,
) -> tuple[list[Any], dict[str, Any], Path]:
    """The recipe named by --config (or the default one) with the flags on top.

    Args:
        argv: the command line; None = the process's.
        groups: dataclasses whose fields are the flags.
        config_classes: the models' configurations, whose fields are flags as well.

    Returns:
        One instance per group, the model configuration's fields that recipe or flags set, and the recipe's path.

    Raises:
        RecipeError: an unknown key or a wrong type in the recipe, or an unknown flag.
    """
    of_model = model_fields(config_classes)
    recipe_path = Path(flag_value(argv, "config") or default_recipe)
    recipe = read_recipe(recipe_path)
    check_recipe(recipe, groups, of_model)
    if names_images(argv, groups):
        of_data = {name for name, flag in flags_of(*groups).items() if flag.names_data}
        recipe = {key: value for key, value in recipe.items() if key not in of_data}
    if flag_value(argv, "preset") is not None:
        recipe.pop("model_name_or_path", None)

    parser = FlagParser(groups, of_model, recipe, description)
    about_recipe = f"A recipe: YAML of these flags' values. (default: {default_recipe})"
    parser.add_argument("--config", type=Path, default=default_recipe, help=about_recipe.replace("%", "%%"))
    *instances, rest, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, args_file_flag=None
    )
    for flag in unknown[:1]:
        name = flag.split("=")[0]  # what follows may be a token
        raise RecipeError(f"unknown flag {name!r}{_did_you_mean(name.lstrip('-'), ['config', *parser.entries])}")
    overrides = {key: _one_or_all(value) for key, value in vars(rest).items() if key in of_model}
    return instances, {**{k: v for k, v in recipe.items() if k in of_model}, **overrides}, recipe_path


def names_images(argv: Sequence[str] | None, groups: Sequence[type]) -> bool:
    """Whether one of the flags on the command line says where images are."""
    places = [name for name, flag in flags_of(*groups).items() if flag.names_data == "place"]
    return any(flag_value(argv, name) is not None for name in places)


def check_recipe(recipe: dict[str, Any], groups: Sequence[type], model_names: Collection[str]) -> None:
    """Raises a RecipeError that names the key, where one is unknown or has a value of the wrong type.

    The model configuration's fields are checked by the configuration itself, when it is built.
    """
    known = [f.name for group in groups for f in dataclasses.fields(group)] + sorted(model_names)
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
    parser.add_argument(*{f"--{name}", f"--{name.replace('_', '-')}"}, dest=name)
    return getattr(parser.parse_known_args(argv)[0], name)


def _one_or_all(value: Any) -> Any:
    """`--image_size 224` is a number, `--image_size 224 192` a list; so is `--depths '[2]'`."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
