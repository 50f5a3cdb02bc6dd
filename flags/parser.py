"""What argparse knows of the flags: --help has them under headings, each once and with its default."""

import argparse
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from .model_fields import ModelField
from .option import HEADINGS, Flag, entries, in_words

METAVARS = {int: "N", float: "X", str: "TEXT", string_to_bool: "BOOL"}


class FlagParser(HfArgumentParser):
    """The flags of argument dataclasses, and the fields of the models' configurations.

    Args:
        groups: the dataclasses.
        model_fields: by name.
        recipe: what it says holds where a flag is not given, and --help shows it.
        description: of the script.
    """

    def __init__(
        self,
        groups: Sequence[Any],
        model_fields: Mapping[str, ModelField],
        recipe: Mapping[str, Any],
        description: str,
    ):
        own = {name: entry for group in groups for name, entry in entries(group).items()}
        self.recipe, self.entries = recipe, {**own, **model_fields}  # before HfArgumentParser adds its arguments
        super().__init__(
            groups,
            description=description,
            usage="%(prog)s [--config RECIPE] [--FLAG VALUE ...]",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for name, model_field in model_fields.items():
            self.section(name).add_argument(
                f"--{name}",
                type=parse_model_value,
                nargs="+" if model_field.takes_list else None,
                metavar="VALUE",
                default=argparse.SUPPRESS,
                help=self.help_of(name),
            )
        self.set_defaults(**{name: value for name, value in recipe.items() if name in own})

    def add_argument(self, *spellings: str, flag: Flag | None = None, **options: Any) -> argparse.Action:
        """As argparse's; a `flag`, as HfArgumentParser finds it in a field, is shown by its first spelling alone.

        The others are arguments of their own that --help leaves out; so is what turns off a flag that is on.
        """
        if flag is None:
            return super().add_argument(*spellings, **options)
        if "dest" in options:
            return super().add_argument(*spellings, help=argparse.SUPPRESS, **options)
        first, *others = spellings
        name, metavar = first.lstrip("-"), METAVARS.get(options["type"])
        for spelling in others:
            unseen = {**options, "dest": name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            super().add_argument(spelling, **unseen)
        return self.section(name).add_argument(first, metavar=metavar, help=self.help_of(name), **options)

    def section(self, name: str) -> Any:
        """The part of --help that a flag is in."""
        return self.sections[self.entries[name].heading]

    @cached_property
    def sections(self) -> dict[str, Any]:
        """The parts of --help by heading; argparse leaves out those that stay empty."""
        headings = dict.fromkeys([*HEADINGS, *(entry.heading for entry in self.entries.values())])
        return {heading: self.add_argument_group(heading) for heading in headings}

    def help_of(self, name: str) -> str:
        """What a flag does, and its default; where the recipe says otherwise, what holds with it."""
        entry = self.entries[name]
        here = in_words(self.recipe[name]) if name in self.recipe else entry.default
        remark = f"default: {entry.default}" + ("" if here == entry.default else f"; in this recipe: {here}")
        return f"{entry.help} ({remark})".replace("%", "%%")  # argparse fills in what a single one names


def parse_model_value(text: str) -> Any:
    """A flag of the model configuration: a number, None, a list in brackets, or text; its type is checked there."""
    if text in ("None", "none"):
        return None
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return yaml.safe_load(text)
