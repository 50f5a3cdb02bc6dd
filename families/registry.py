"""The families that there are: those with a page in `encoders`, and whatever else is registered."""

import pkgutil
from importlib import import_module

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    PreTrainedConfig,
)

from ..flags.option import RecipeError
from ..modeling_mim import MIMPreTrainedMixin
from . import encoders
from .family import FAMILIES, Family

# whose fields are flags; grows with every family
CONFIG_CLASSES: list[type[PreTrainedConfig]] = []
DEFAULT = "mimae"


def register(family: Family) -> None:
    """Make a family known to the scripts and the exports, and its classes to transformers' Auto classes.

    Raises:
        ValueError: its `model_type` has a family already, or transformers knows it.
    """
    config_class = family.config_class
    AutoConfig.register(family.name, config_class)
    AutoModel.register(config_class, family.encoder_class)
    AutoModelForPreTraining.register(config_class, family.pretraining_class)
    AutoModelForImageClassification.register(config_class, family.classification_class)
    if family.backbone_class is not None:
        AutoBackbone.register(config_class, family.backbone_class)
    FAMILIES[family.name] = family
    CONFIG_CLASSES.append(config_class)


def family_named(model_type: str | None) -> Family:
    """The family that a recipe names; MI-MAE's where it names none.

    Raises:
        RecipeError: there is none of that name.
    """
    model_type = model_type or DEFAULT
    if model_type not in FAMILIES:
        raise RecipeError(f"model_type={model_type!r} is not known; there are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def family_of(model_class: type[MIMPreTrainedMixin]) -> Family:
    """The family that a class of models is of."""
    return FAMILIES[model_class.config_class.model_type]


_pages = (import_module(f"{encoders.__name__}.{page.name}") for page in pkgutil.iter_modules(encoders.__path__))
for _page in sorted(_pages, key=lambda page: page.FAMILY.name):
    register(_page.FAMILY)
