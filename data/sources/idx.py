"""Folders in the IDX format of MNIST, Fashion-MNIST, KMNIST and EMNIST.

The format: two zero bytes, the element type, the number of dimensions, each dimension as a big-endian uint32, then
the elements. Shapes: n images of (H, W).
"""

import gzip
import os
from pathlib import Path

import numpy as np

from .base import ArraySource

IMAGE_FILES = "*-images-idx3-ubyte*"
FILE_PREFIX = {"train": "train", "test": "t10k"}


def is_idx_folder(folder: str | os.PathLike[str]) -> bool:
    return any(Path(folder).glob(IMAGE_FILES))


def idx_splits(folder: str | os.PathLike[str]) -> list[str]:
    """The splits of which the folder has images."""
    return [name for name, prefix in FILE_PREFIX.items() if any(Path(folder).glob(prefix + IMAGE_FILES[1:]))]


def open_idx_folder(folder: str | os.PathLike[str], split: str) -> ArraySource:
    """Opens one split of an IDX folder.

    Raises:
        ValueError: no such split; a file is missing, is not IDX or has another length than its header says; images
            and labels differ in number.
    """
    if split not in (present := idx_splits(folder)):
        raise ValueError(f"IDX folder {folder} has no split {split!r}; it has {present}")
    images = read_idx(_find(folder, f"{FILE_PREFIX[split]}-images-idx3-ubyte"), ndim=3)  # (n, H, W)
    labels = read_idx(_find(folder, f"{FILE_PREFIX[split]}-labels-idx1-ubyte"), ndim=1)  # (n,)
    if len(images) != len(labels):
        raise ValueError(f"IDX folder {folder}, split {split!r}: {len(images)} images but {len(labels)} labels")
    return ArraySource(images, labels, name=f"{folder}/{FILE_PREFIX[split]}-images-idx3-ubyte")


def read_idx(path: Path, *, ndim: int) -> np.ndarray:
    """Reads one file of unsigned bytes, gzipped or plain, as a uint8 array of `ndim` dimensions."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            content = file.read()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is a damaged gzip file: {error}") from error
    header = 4 + 4 * ndim
    if len(content) < header or content[:4] != bytes([0, 0, 8, ndim]):
        raise ValueError(f"{path} is not an IDX file of unsigned bytes with {ndim} dimension(s)")
    shape = np.frombuffer(content, ">u4", count=ndim, offset=4).astype(np.int64)
    if len(content) - header != shape.prod():
        raise ValueError(
            f"{path}: the header announces {shape.prod()} bytes of shape {shape.tolist()}, "
            f"{len(content) - header} follow; fetch the file again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _find(folder: str | os.PathLike[str], name: str) -> Path:
    for path in (Path(folder, name), Path(folder, name + ".gz")):
        if path.is_file():
            return path
    raise ValueError(f"IDX folder {folder} lacks {name} (plain or .gz)")
