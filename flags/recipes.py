"""Recipe and flags become dataclasses. Flags win; an unknown key or a wrong type is refused by name."""

import argparse
import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from transformers import HfArgumentParser, PreTrainedConfig

from .data import DATA_KEYS, PLACES
from .option import RecipeError


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
    """Adds the fields of the models' configurations as flags, a group for each set of models that have them.

    Returns:
        Their names.
    """
    owners_of: dict[str, list[type[PreTrainedConfig]]] = {}
    for config_class in config_classes:
        for name in config_fields(config_class):
            owners_of.setdefault(name, []).append(config_class)
    groups: dict[tuple[type[PreTrainedConfig], ...], list[str]] = {}
    for name, owners in sorted(owners_of.items(), key=lambda item: -len(item[1])):
        groups.setdefault(tuple(owners), []).append(name)
    for owners, members in groups.items():
        alone = " alone" if len(owners) == 1 < len(config_classes) else ""
        group = parser.add_argument_group(f"fields of {' and '.join(each.__name__ for each in owners)}{alone}")
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
    return set(owners_of)


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
