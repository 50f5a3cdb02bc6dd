"""From the classes of the data to the classes of a model."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

WNID = re.compile(r"n\d{8}")
NAMES_SHOWN = 5


def label_mapping(
    source_names: Sequence[str] | None, id2label: Mapping[int, str], wnids: Sequence[str] | None = None
) -> np.ndarray:
    """Returns the model's label for each label of the data, found by name.

    Data without names keeps its labels. Where the data's classes are WordNet ids (the class folders of ImageNet and
    its kin) and the model's are not, the model's must be those of ImageNet, in the order of their ids, as everywhere.

    Args:
        source_names: `label_names` of an `ImageSource`.
        id2label: of the model's config.
        wnids: the ids of ImageNet's 1,000 classes, sorted.

    Returns:
        int64 (classes of the data,); without names (classes of the model,).

    Raises:
        ValueError: classes that the model does not have, or has twice.
    """
    names = [id2label[label] for label in range(len(id2label))]
    if source_names is None:
        return np.arange(len(names))
    if wnids is not None and len(names) == len(wnids) and _are_wnids(source_names) and not _are_wnids(names):
        names = list(wnids)
    count = Counter(names)
    for wrong, problem in (
        ([name for name in source_names if count[name] == 0], "are not in"),
        ([name for name in source_names if count[name] > 1], "occur more than once in"),
    ):
        if wrong:
            raise ValueError(
                f"{len(wrong)} of the {len(source_names)} classes of the images {problem} the model's label list: "
                f"{_some(wrong)}; the model has {len(names)}: {_some(names)}"
            )
    position = {name: label for label, name in enumerate(names)}
    return np.array([position[name] for name in source_names], dtype=np.int64)


def _are_wnids(names: Sequence[str]) -> bool:
    return all(WNID.fullmatch(name) for name in names)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:NAMES_SHOWN])) + (", ..." if len(names) > NAMES_SHOWN else "")
