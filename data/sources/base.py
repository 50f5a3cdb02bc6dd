"""What every image source offers, and the source that holds its images in memory.

Shapes: n images in the source; H, W, C height, width and channels of one image.
"""

import hashlib
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

Row = tuple[bytes | np.ndarray, Any]


class RowSource(ABC):
    """A finite, indexable set of images that have not been decoded yet, each with its label or annotation.

    Attributes:
        name: of the data, for messages.
        block_sizes: int64 (blocks,), rows of each block in global index order; a block is read at once.
            A source whose rows can be read one by one is a single block.
        reads_blocks: whether a row costs as much as its whole block, so that a loader should call `read_block`.
        fingerprint: hex digest of what identifies the data wherever it lies; a resumed run compares it.

    Instances are picklable; whatever must be opened is opened in the process that reads.
    """

    name: str
    block_sizes: np.ndarray
    reads_blocks: bool = False
    fingerprint: str

    def __len__(self) -> int:
        return int(self.block_sizes.sum())

    @abstractmethod
    def read(self, index: int) -> Row:
        """Returns a row: the image as encoded bytes or as uint8 (H, W) or (H, W, C), and its label or annotation."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Returns "file:row", which identifies the sample in messages and logs."""

    def next_in_file(self, index: int) -> int:
        """Returns the index of the next row of the same file; the last row is followed by the first."""
        return (index + 1) % len(self)

    def block_of(self, indices: int | np.ndarray) -> Any:
        """Returns the block that holds each index: int64, the shape of `indices`."""
        return np.searchsorted(np.cumsum(self.block_sizes), indices, side="right")

    def read_block(self, block: int, rows: np.ndarray) -> list[Row]:
        """Reads the given rows (global indices, ascending) of a block: a list of what `read` returns."""
        return [self.read(row) for row in rows.tolist()]


class ImageSource(RowSource):
    """A `RowSource` of images with or without labels: `read` returns (image, label or None).

    Attributes:
        label_names: names of the classes in label order, or None.
        has_labels: whether `read` returns a label.
    """

    label_names: list[str] | None = None
    has_labels: bool = False

    def labels(self) -> np.ndarray:
        """Returns the label of every row, without decoding an image: int64 (n,), none negative.

        Raises:
            ValueError: the source has no labels, or rows without one; says what to do.
        """
        if not self.has_labels:
            raise ValueError(f"{self.name} has no labels: name the column that holds them by --label_column_name")
        labels = self._stored_labels()
        if len(unlabelled := np.flatnonzero(labels < 0)):
            raise ValueError(
                f"{len(unlabelled)} of the {len(labels)} images of {self.name} have no label, the first is "
                f"{self.describe(int(unlabelled[0]))}: this looks like an unlabelled test split; take a labelled "
                "split, or name another column by --label_column_name"
            )
        return labels

    @abstractmethod
    def _stored_labels(self) -> np.ndarray:
        """Returns the stored labels, negative where there is none: int64 (n,). Called only if `has_labels`."""

    def file_names(self) -> list[str]:
        """Returns the file name of every row (of a row of an archive, its key), without reading an image.

        Raises:
            ValueError: rows without a file name.
        """
        names = self._stored_file_names()
        if None in names:
            raise ValueError(
                f"{self.describe(names.index(None))} has no file name, so a list of names cannot choose among the "
                "images: use --train_fraction instead"
            )
        return [name for name in names if name is not None]

    def _stored_file_names(self) -> list[str | None]:
        return [None] * len(self)


class ArraySource(ImageSource):
    """Images of one size, held in memory.

    Args:
        images: uint8 (n, H, W) or (n, H, W, C).
        labels: integers (n,), or None.
        name: what `describe` calls the "file".
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray | None, *, name: str, label_names: list[str] | None = None
    ):
        if len(images) == 0:
            raise ValueError(f"{name} holds no image")
        self.images, self.name = images, name
        self._labels = np.asarray([] if labels is None else labels, dtype=np.int64)
        self.block_sizes = np.array([len(images)], dtype=np.int64)
        self.has_labels, self.label_names = labels is not None, label_names
        self.fingerprint = hashlib.sha256(f"{images.shape}".encode() + images.tobytes()).hexdigest()

    def read(self, index: int) -> tuple[np.ndarray, int | None]:
        return self.images[index], int(self._labels[index]) if self.has_labels else None

    def describe(self, index: int) -> str:
        return f"{self.name}:{index}"

    def _stored_labels(self) -> np.ndarray:
        return self._labels
