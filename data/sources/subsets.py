"""Subsets of a source, for low-shot training: a fraction of every class, or the files of a list.

Shapes: n images in the source, m of them in the subset.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..order import class_permutation
from ..words import some
from .base import ImageSource, Row

# The Hub's ImageNet names a file n01440764_10026_n01440764.JPEG, the original n01440764_10026.JPEG.
APPENDED_WNID = re.compile(r"_n\d{8}$")


class SubsetSource(ImageSource):
    """Rows of another source, in its order, with their labels and under their original descriptions.

    Blocks of the source are blocks here, without the rows left out and without blocks that have none left; the next
    row "in the file" is the next of the subset, so that no image from outside replaces a bad one.

    Args:
        indices: int (m,), ascending, without repetition.

    Raises:
        ValueError: the indices are none, out of order or not in the source.
    """

    def __init__(self, source: ImageSource, indices: Sequence[int] | np.ndarray):
        self.source, self.indices = source, np.asarray(indices, dtype=np.int64)
        if len(self.indices) == 0 or np.any(np.diff(self.indices, prepend=-1, append=len(source)) < 1):
            raise ValueError(
                f"a subset of {source.name} needs indices in 0..{len(source) - 1}, ascending, each once, got {indices}"
            )
        self.blocks, self.block_sizes = np.unique(source.block_of(self.indices), return_counts=True)
        self.name = f"{len(self.indices)} images of {source.name}"
        self.label_names, self.has_labels = source.label_names, source.has_labels
        self.reads_blocks = source.reads_blocks
        self.fingerprint = hashlib.sha256(source.fingerprint.encode() + self.indices.tobytes()).hexdigest()

    def read(self, index: int) -> Row:
        return self.source.read(int(self.indices[index]))

    def read_block(self, block: int, rows: np.ndarray) -> list[Row]:
        return self.source.read_block(int(self.blocks[block]), self.indices[rows])

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.indices[index]))

    def _stored_labels(self) -> np.ndarray:
        return self.source.labels()[self.indices]

    def _stored_file_names(self) -> list[str | None]:
        names = self.source.file_names()
        return [names[index] for index in self.indices]


def low_shot_indices(
    labels: np.ndarray, fraction: float, seed: int, label_names: Sequence[str] | None = None
) -> np.ndarray:
    """Draws `fraction` of every class, rounded, but at least one image.

    With the same seed a smaller fraction's images are among a larger one's. The draw is the same on every machine.

    Args:
        labels: int (n,), none negative.
        fraction: in (0, 1].
        label_names: names of all classes, in label order; without them the classes are the labels that occur.

    Returns:
        indices int64 (m,), ascending.

    Raises:
        ValueError: an invalid fraction; fewer images than classes; a class without an image.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"train_fraction must lie above 0 and not above 1, got {fraction}")
    if label_names is not None:
        if len(labels) < len(label_names):
            raise ValueError(f"{len(labels)} images cannot hold one of each of {len(label_names)} classes")
        _check_every_class(labels, range(len(label_names)), label_names, "the training images")
    drawn = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = max(1, round(fraction * len(rows)))
        drawn.append(rows[class_permutation(len(rows), seed, int(label))[:count]])
    return np.sort(np.concatenate(drawn))


def read_subset_file(path: str | os.PathLike[str], source: ImageSource) -> np.ndarray:
    """Finds the images that a file lists, one name a line, as SimCLR's `1percent.txt` does: int64 (m,), ascending.

    Names are compared without folders, extension and a WordNet id at the end: shards and copies of ImageNet differ in
    these.

    Raises:
        ValueError: no such file; no name in it; names that no image has, or several; images without file names; a
            class of the source without an image in the list.
    """
    if not Path(path).is_file():
        raise ValueError(f"--train_subset_file {path} is not a file")
    listed = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not listed:
        raise ValueError(f"--train_subset_file {path} is empty: it must hold one file name a line")
    rows: dict[str, list[int]] = {}
    for index, name in enumerate(source.file_names()):
        rows.setdefault(_bare(name), []).append(index)
    found = {name: rows.get(_bare(name), []) for name in listed}
    unknown = [name for name, indices in found.items() if not indices]
    if wrong := unknown or [name for name, indices in found.items() if len(indices) > 1]:
        are = "are not among" if unknown else "are the names of several of"
        raise ValueError(
            f"{len(wrong)} of the {len(found)} names in {path} {are} the {len(source)} images of {source.name}: "
            f"{some(wrong)}"
        )
    indices = np.unique([indices[0] for indices in found.values()])
    labels = source.labels()
    classes = np.unique(labels) if source.label_names is None else range(len(source.label_names))
    _check_every_class(labels[indices], classes, source.label_names, f"the list {path}")
    return indices


def _check_every_class(
    labels: np.ndarray, classes: Sequence[int] | np.ndarray, label_names: Sequence[str] | None, place: str
) -> None:
    missing = sorted(set(map(int, classes)) - set(labels.tolist()))
    if missing:
        names = [str(label) if label_names is None else repr(label_names[label]) for label in missing]
        raise ValueError(
            f"{len(missing)} of {len(classes)} classes have no image in {place} and cannot be learnt: {some(names)}"
        )


def _bare(name: str) -> str:
    return APPENDED_WNID.sub("", os.path.splitext(os.path.basename(name))[0])
