"""How a flag is written down: one line with its default, its help and its range."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, get_args, get_type_hints

from huggingface_hub.dataclasses import type_validator


class RecipeError(ValueError):
    """A recipe or a flag that cannot be used; the message names the key."""


def option(default: Any, text: str) -> Any:
    """A flag with its default and its help."""
    metadata = {"help": text.replace("%", "%%")}  # argparse fills in what a single one names
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


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


def check_types(arguments: Any) -> None:
    """Refuses, by name, a field of a dataclass whose value is not of the annotated type; turns `1` into a float.

    So it does with the items of a list.

    `huggingface_hub`'s `@strict` would do it, were it not for `HfArgumentParser`, which writes over `field.type`.
    """
    annotations = get_type_hints(type(arguments))
    for name in (f.name for f in fields(arguments)):
        value, annotation = getattr(arguments, name), annotations[name]
        alternatives = (annotation, *get_args(annotation))
        if type(value) is int and float in alternatives:
            value = float(value)
        elif type(value) is list and list[float] in alternatives:
            value = [float(item) if type(item) is int else item for item in value]
        setattr(arguments, name, value)
        type_validator(name, value, annotation)
