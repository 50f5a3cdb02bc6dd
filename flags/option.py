"""How a flag is written down: one field that says all there is to say of it."""

import operator
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import partial
from inspect import get_annotations
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from huggingface_hub.dataclasses import type_validator


class RecipeError(ValueError):
    """A recipe or a flag that cannot be used; the message names the key."""


BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}
SHORTER_WORDS = {
    "at least 0": "0 or more",
    "above 0": "positive",
    "at least 0 and at most 1": "in 0..1",
    "at least 0 and below 1": "in 0..1, below 1",
}


@dataclass(frozen=True)
class Flag:
    """What is said of a flag beside its name, its type and its default.

    help: what it does.
    affects_result: what a resumed run is held to. True: to the same value. The name of a setting: to the same of what
        follows from the value, which that setting holds ("schedule": its fields; "model": those of the configuration).
        False: to nothing, as the trained weights do not depend on it.
    at_least, above, at_most, below: the range of its value, or of each of its values; None is in every range.
    names_data: "place": it says where images are, and on the command line it replaces all that a recipe says of data.
        "detail": it says more about those images, and means nothing for others.
    unset: in words, what holds where its default is None.
    under: its heading in --help, one of `HEADINGS`, where it is not that of its class.
    """

    help: str
    affects_result: bool | str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    names_data: Literal["place", "detail"] | None = None
    unset: str = "none"
    under: str | None = None

    def check(self, name: str, value: Any) -> None:
        """Raises a RecipeError where the value, or one of several, is out of range; NaN is in none."""
        bounds = {bound: limit for bound in BOUNDS if (limit := getattr(self, bound)) is not None}
        if value is None or not bounds:
            return
        values = value if isinstance(value, list) else [value]
        if not values or not all(BOUNDS[bound](each, limit) for each in values for bound, limit in bounds.items()):
            spelt_out = " and ".join(f"{bound.replace('_', ' ')} {limit}" for bound, limit in bounds.items())
            words = SHORTER_WORDS.get(spelt_out, spelt_out)
            each = "one or more numbers, each " if isinstance(value, list) else ""
            raise RecipeError(f"{name}={value} must be {each}{words}")


# of --help, in its order; those of what only some models have follow
MASKS_AND_LOSSES = "masks and losses"
HEADINGS = (
    "task",
    "model",
    "data",
    "augmentation",
    MASKS_AND_LOSSES,
    "optimisation",
    "probe and k-NN",
    "evaluation",
    "machine",
    "run folder",
    "Hub",
)


def option(default: Any, help: str, *, affects_result: bool | str, **facts: Any) -> Any:
    """A flag: its default, and what `Flag` says of it."""
    metadata = {"flag": Flag(help, affects_result, **facts)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


# flags that the learning rate and the length of a run follow from; that say where images are; that say more about them
of_schedule = partial(option, affects_result="schedule")
place = partial(option, None, names_data="place", affects_result="images")
detail = partial(option, names_data="detail", affects_result="images")


def changed(group: Any, name: str, **changes: Any) -> Any:
    """A flag of a base class that in a subclass has another `default`, or of which something else is said."""
    inherited = group.__dataclass_fields__[name]
    default = changes.pop("default", inherited.default)
    return field(default=default, metadata={"flag": replace(inherited.metadata["flag"], **changes)})


def flags_of(*groups: Any) -> dict[str, Flag]:
    """The flags of argument dataclasses, or of their instances, by name."""
    return {each.name: each.metadata["flag"] for group in groups for each in fields(group)}


def compared_values(*groups: Any) -> dict[str, Any]:
    """The values of instances of argument dataclasses that a resumed run must have under the flags' own names."""
    return {
        name: getattr(group, name)
        for group in groups
        for name, flag in flags_of(group).items()
        if flag.affects_result is True
    }


@dataclass(frozen=True)
class Entry:
    """A flag as --help and the page of all flags have it: in words."""

    name: str
    heading: str
    help: str
    default: str


def entries(group: Any) -> dict[str, Entry]:
    """The flags of a dataclass by name; one that it inherits is under the heading of the base class that added it."""
    found = {}
    for each in fields(group):
        flag = each.metadata["flag"]
        owner = next(base for base in reversed(group.__mro__) if each.name in get_annotations(base))
        default = flag.unset if each.default is None else in_words(default_of(each))
        off = f" --no_{each.name} turns it off." if each.default is True else ""
        found[each.name] = Entry(each.name, flag.under or owner.HEADING, flag.help + off, default)
    return found


def default_of(declared: Field[Any]) -> Any:
    """The default of a dataclass's field."""
    return declared.default if declared.default_factory is MISSING else declared.default_factory()


def in_words(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)


@dataclass
class CheckedArguments:
    """Flags whose types and ranges are checked."""

    HEADING: ClassVar[str]  # in --help, of the flags that a class adds

    def __post_init__(self) -> None:
        check_types(self)
        for name, flag in flags_of(self).items():
            flag.check(name, getattr(self, name))

    def _check_one_place(self, *names: str) -> None:
        """Refuses more than one of the flags that say where images are."""
        named = [name for name in names if getattr(self, name)]
        if len(named) > 1:
            raise RecipeError(f"{' and '.join(named)} name different data: give one of them")


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
