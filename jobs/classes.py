"""Names of classes: those of images, those of a model, and the mapping between them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.sources.opening import ImageSource
from ..evaluation.robustness import class_positions


def class_names(source: ImageSource) -> list[str]:
    """A name for each class of the images: theirs, or their numbers.

    Raises:
        ValueError: the images have no labels.
    """
    if source.label_names is not None:
        return list(source.label_names)
    return [str(label) for label in range(source.labels().max() + 1)]


def numbered(names: Sequence[str]) -> dict[str, Any]:
    """`id2label` and `label2id` of a configuration."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}


def label_map(source: ImageSource, names: Sequence[str]) -> np.ndarray:
    """The position in `names` of each label of the images: by name, or the label itself if classes have no names.

    Returns:
        int64 (classes of the images,), or (len(names),) where nothing has to be mapped.

    Raises:
        ValueError: a class that `names` does not have.
    """
    if source.label_names is not None and list(source.label_names) != list(names):
        return np.array(class_positions(source.label_names, names))
    highest = source.labels().max()
    if highest >= len(names):
        raise ValueError(
            f"{source.name} has images of label {highest}, but the labels of the model end at {len(names) - 1}"
        )
    return np.arange(len(names))
