"""The fields of the models' configurations as flags: their help is the docstring of the configuration."""

import dataclasses
import functools
import inspect
import itertools
import re
import textwrap
from collections.abc import Sequence
from typing import get_args, get_origin

from transformers import PreTrainedConfig

from ..configuration_mim import MIMConfigMixin
from .option import MASKS_AND_LOSSES, Entry, default_of, in_words

# `name: text` or `name, name: text`, and transformers' `name (type, default):` with the text below
ENTRY = re.compile(r"(\w+(?:, \w+)*)(?: \(.*\))?:\s*(.*)")


@dataclasses.dataclass(frozen=True)
class ModelField(Entry):
    """A field that at least one of the configurations has; `takes_list`: whether a list may be its value."""

    takes_list: bool


def config_fields(config_class: type[PreTrainedConfig]) -> list[str]:
    """The model configuration's own public fields, without those that every transformers configuration has."""
    common = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    return [f.name for f in dataclasses.fields(config_class) if f.name not in common and not f.name.startswith("_")]


def model_fields(config_classes: Sequence[type[PreTrainedConfig]]) -> dict[str, ModelField]:
    """All fields of the configurations by name: those that most of them have first."""
    names = dict.fromkeys(itertools.chain.from_iterable(map(config_fields, config_classes)))
    owners = {name: [each for each in config_classes if name in config_fields(each)] for name in names}
    return {name: _model_field(name, owners[name]) for name in sorted(names, key=lambda name: -len(owners[name]))}


def _model_field(name: str, owners: Sequence[type[PreTrainedConfig]]) -> ModelField:
    declared = [next(f for f in dataclasses.fields(owner) if f.name == name) for owner in owners]
    is_of_method = name in (f.name for f in dataclasses.fields(MIMConfigMixin))
    models = " and ".join(owner.model_type for owner in owners)
    return ModelField(
        name=name,
        heading=MASKS_AND_LOSSES if is_of_method else f"architecture of {models}",
        help=_by_model({owner.model_type: described_fields(owner).get(name, "") for owner in owners}),
        default=_by_model(
            {owner.model_type: in_words(default_of(f)) for owner, f in zip(owners, declared, strict=True)}
        ),
        takes_list=any(get_origin(hint) is list for f in declared for hint in (f.type, *get_args(f.type))),
    )


def described_fields(config_class: type[PreTrainedConfig]) -> dict[str, str]:
    """What the docstrings of a configuration and of its bases say of its fields; its own win."""
    found: dict[str, str] = {}
    for owner in reversed(config_class.__mro__):
        found |= described_arguments(vars(owner).get("__doc__"))
    return found


@functools.cache
def described_arguments(docstring: str | None) -> dict[str, str]:
    """The section "Args:" of a docstring, in this project's style or in transformers'; empty where there is none."""
    lines = iter(inspect.cleandoc(docstring or "").splitlines())
    any(line == "Args:" for line in lines)  # moves on to what follows it
    section = itertools.takewhile(lambda line: not line or line[0].isspace(), lines)
    names: list[str] = []
    found: dict[str, str] = {}
    for line in textwrap.dedent("\n".join(section)).splitlines():
        if entry := ENTRY.fullmatch(line):
            names = entry[1].split(", ")
            line = entry[2]
        for name in names:
            found[name] = f"{found.get(name, '')} {line.strip()}".strip()
    return found


def _by_model(words: dict[str, str]) -> str:
    """What is the same for all models once; else, what is said of each."""
    different = dict.fromkeys(words.values())
    if len(different) == 1:
        return different.popitem()[0]
    return "; ".join(f"{model}: {text.rstrip('.')}" for model, text in words.items())
