"""What a stage costs: operations counted, and the time that this makes at the rates of what was done already."""

import statistics
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mimae.families.registry import family_named
from mimae.flags.model_fields import config_fields

from .frozen import PROBE_IMAGES
from .plan import ALL, CORRUPTED, FEW, FEW_SEEDS, FROZEN, PRETRAIN, Group, Run, Scale, recipe_at, tasks
from .records import Records

TRAIN_IMAGES, TEST_IMAGES = 60_000, 10_000  # of Fashion-MNIST
CORRUPTED_SETS = 25  # five corruptions, five severities
PASSES = 3  # a backward pass costs two forward ones
# fields of a configuration that change no matrix product's shape
WITHOUT_COST = {"latent_pooling", "mask_strategy", "mi_gate_mode", "mi_gate_threshold", "train_approximator"}


def operations(run: Run, stage: str) -> float:
    """Floating-point operations of a stage."""
    per_view, per_image = _forward_operations(run.recipe, _costly(run.arm.fields))
    epochs = {stage: recipe_at(run.scale.finetuning(stage))["num_train_epochs"] for stage in (FEW, ALL)}
    return {
        PRETRAIN: PASSES * per_view * (run.views if run.arm.is_trained else run.scale.views_per_step),
        FROZEN: per_image * (PROBE_IMAGES + TEST_IMAGES),
        FEW: FEW_SEEDS * per_image * (PASSES * epochs[FEW] * TRAIN_IMAGES / 100 + TEST_IMAGES),
        ALL: per_image * (PASSES * epochs[ALL] * TRAIN_IMAGES + TEST_IMAGES),
        CORRUPTED: per_image * CORRUPTED_SETS * TEST_IMAGES,
    }[stage]


def _costly(fields: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What the cost depends on: of a weight, whether there is any."""
    named = {name: value for name, value in fields.items() if name not in WITHOUT_COST}
    return tuple(sorted((k, float(v > 0) if k.endswith("_weight") else v) for k, v in named.items()))


@cache
def _forward_operations(recipe: Any, fields: tuple[tuple[str, Any], ...]) -> tuple[float, float]:
    """Of one masked view with its decoder, and of one whole image through the encoder."""
    settings = recipe_at(recipe) | dict(fields)
    family = family_named(settings.get("model_type"))
    known = config_fields(family.config_class)
    config = family.build_config(settings.get("preset"), {k: v for k, v in settings.items() if k in known})
    with torch.device("meta"):
        model = family.pretraining_class(config).eval()
        images, noise = torch.empty(1, config.num_channels, *config.image_size_2d), torch.empty(1, *config.noise_shape)
    counts = []
    for forward in (lambda: model(images, noise=noise, return_logits=False), lambda: model.encode(images)):
        with FlopCounterMode(display=False) as counter:
            forward()
        counts.append(counter.get_total_flops())
    return counts[0] / config.num_views, counts[1]


def seconds(run: Run, stage: str, records: Records, device: str | None = None) -> float | None:
    """An estimate from the rates of what was done, of the same stage if there is any; None while nothing is.

    Args:
        device: whose rates count; None: of all.
    """
    rates: dict[str, list[float]] = {}
    for line in records.lines:
        if device in (None, line["device"]):
            rates.setdefault(line["stage"], []).append(line["operations"] / line["seconds"])
    if not rates:
        return None
    return operations(run, stage) / statistics.median(rates.get(stage) or [r for each in rates.values() for r in each])


def price(
    scale: Scale, records: Records, device: str | None = None
) -> Iterator[tuple[Group, int, int, float, float | None]]:
    """Of each group: stages in all, those that are not done, their operations, and the hours that they take.

    Models are not in a checkout: where one was trained already, and a stage that needs it is not done, its training is
    in the operations and hours once more.
    """
    models: set[str] = set()
    for group, members in groupby(tasks(scale), key=lambda task: task[0]):
        stages = [(run, stage) for _, run, stage in members]
        left = [(run, stage) for run, stage in stages if not records.find(run, stage)]
        models |= {str(run) for run, stage in left if stage == PRETRAIN}
        again = {str(run): (run, PRETRAIN) for run, _ in left if str(run) not in models}
        models |= again.keys()
        work = [*again.values(), *left]
        times = [seconds(run, stage, records, device) for run, stage in work]
        known = [each for each in times if each is not None]
        hours = sum(known) / 3600 if len(known) == len(times) else None
        yield group, len(stages), len(left), sum(operations(run, stage) for run, stage in work), hours
