"""Tests of a classifier on variants of ImageNet and on corrupted images: opened before a training, run after it."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from ..data.images.transforms import evaluation_transform
from ..data.sources.opening import ImageSource, open_image_source
from ..evaluation.corruptions import CorruptedTransform
from ..evaluation.robustness import (
    SEVERITIES,
    RestrictedClassifier,
    class_positions,
    corruption_folders,
    corruption_table,
    imagenet_wnids,
)
from ..training.hf_trainer.classification import ClassificationTrainer

logger = logging.getLogger(__name__)

RobustnessTest = Callable[[ClassificationTrainer], dict[str, Any]]  # of a trainer's model
# images, names of the classes that their labels are places in, and what replaces the usual crop → batches
LoaderOf = Callable[[ImageSource, Sequence[str], nn.Module | None], DataLoader[Any]]


def imagenet_tests(
    folders: Mapping[str, str | None],
    names: Sequence[str],
    *,
    image_size: tuple[int, int],
    loader_of: LoaderOf,
    tester_of: Callable[[nn.Module], ClassificationTrainer],
) -> dict[str, RobustnessTest]:
    """A test for each of "imagenet_a", "imagenet_r", "imagenet_sketch" and "imagenet_c" that has a folder.

    Args:
        folders: of the sets; None for those that are not wanted.
        names: of the model's classes, in the order of its logits.
        image_size: (h, w) of the model.
        tester_of: a trainer that tests a model.

    Raises:
        ValueError: what is wrong with a folder, or classes that the model does not have.
    """

    def opened(key: str, folder: str | os.PathLike[str]) -> ImageSource:
        return open_image_source(train_dir=folder, flag=f"--{key}_dir")

    tests: dict[str, RobustnessTest] = {}
    for key, wnids in (("imagenet_a", imagenet_wnids("a")), ("imagenet_r", imagenet_wnids("r"))):
        if folder := folders[key]:
            loader = loader_of(opened(key, folder), wnids, None)
            tests[key] = partial(_restricted_metrics, class_positions(wnids, names), loader, tester_of)
    if folder := folders["imagenet_sketch"]:
        tests["imagenet_sketch"] = partial(_metrics, loader_of(opened("imagenet_sketch", folder), names, None))
    if folder := folders["imagenet_c"]:
        cropped = evaluation_transform(image_size, crop_ratio=1)  # as the published images are
        images = corruption_folders(folder).items()
        loaders = {key: loader_of(opened("imagenet_c", each), names, cropped) for key, each in images}
        tests["imagenet_c"] = partial(_corruption_errors, loaders, relative_to_alexnet=True)
    return tests


def corruption_test(
    source: ImageSource,
    names: Sequence[str],
    corruptions: Sequence[str],
    *,
    image_size: tuple[int, int],
    crop_ratio: float,
    loader_of: LoaderOf,
) -> RobustnessTest:
    """A test on images that are corrupted on the fly, in each way at each severity.

    Raises:
        ImportError, ValueError: see `CorruptedTransform`.
    """
    loaders = {}
    for corruption, severity in product(corruptions, SEVERITIES):
        transform = CorruptedTransform(image_size, corruption, severity, crop_ratio=crop_ratio)
        loaders[corruption, severity] = loader_of(source, names, transform)
    return partial(_corruption_errors, loaders, relative_to_alexnet=False)


def _metrics(loader: DataLoader[Any], trainer: ClassificationTrainer) -> dict[str, float]:
    return trainer.test(loader)[0]


def _restricted_metrics(
    positions: Sequence[int],
    loader: DataLoader[Any],
    tester_of: Callable[[nn.Module], ClassificationTrainer],
    trainer: ClassificationTrainer,
) -> dict[str, float]:
    """Metrics of a trainer's model among the classes at these positions alone."""
    return _metrics(loader, tester_of(RestrictedClassifier(trainer.model, positions)))


def _corruption_errors(
    loaders: Mapping[tuple[str, int], DataLoader[Any]], trainer: ClassificationTrainer, *, relative_to_alexnet: bool
) -> dict[str, Any]:
    """The `corruption_table` of a trainer's model, from images by corruption and severity."""
    errors = {}
    for (corruption, severity), loader in loaders.items():
        errors[corruption, severity] = 1 - _metrics(loader, trainer)["accuracy"]
        logger.info("%s %d: %.1f %% wrong", corruption, severity, 100 * errors[corruption, severity])
    return corruption_table(errors, relative_to_alexnet=relative_to_alexnet)
