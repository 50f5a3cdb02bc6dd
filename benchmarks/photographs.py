"""JPEGs like ImageNet's, made of photographs that scikit-image and scikit-learn bring along; in memory and on disk."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from datasets import Image as ImageFeature
from PIL import Image

from mimae.data.sources.base import ImageSource

WIDTH, HEIGHT = 500, 375  # pixels; ImageNet's most frequent size
ROW_GROUP = 64  # rows
FEATURES = Features({"image": ImageFeature()})


def photographs() -> list[Image.Image]:
    """Six colour photographs, none smaller than `WIDTH` x `HEIGHT`."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    images = [
        data.astronaut(),
        data.coffee(),
        data.rocket(),
        data.stereo_motorcycle()[0],
        *load_sample_images().images,
    ]
    return [Image.fromarray(image) for image in images]


def jpegs(count: int, quality: int) -> list[bytes]:
    """`count` different crops of the photographs, each `WIDTH` x `HEIGHT`, encoded; the same at every call."""
    generator, whole = np.random.default_rng(0), photographs()
    encoded = []
    for number in range(count):
        image = whole[number % len(whole)]
        left, top = generator.integers(0, (image.width - WIDTH + 1, image.height - HEIGHT + 1)).tolist()
        encoded.append(encode(image.crop((left, top, left + WIDTH, top + HEIGHT)), quality))
    return encoded


def encode(image: Image.Image, quality: int) -> bytes:
    """The bytes of a JPEG file."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    return content.getvalue()


class EncodedSource(ImageSource):
    """Encoded images in memory, without labels."""

    name = fingerprint = "photographs"

    def __init__(self, encoded: list[bytes]):
        self.encoded, self.block_sizes = encoded, np.array([len(encoded)])

    def read(self, index: int) -> tuple[bytes, None]:
        return self.encoded[index], None

    def describe(self, index: int) -> str:
        return f"{self.name}:{index}"

    def _stored_labels(self) -> np.ndarray:
        return np.full(len(self), -1)


def write_folder(folder: Path, encoded: list[bytes]) -> Path:
    """Writes each image as a file of its own, and returns the folder."""
    folder.mkdir()
    for number, image in enumerate(encoded):
        (folder / f"{number:05d}.jpg").write_bytes(image)
    return folder


def write_parquet(path: Path, encoded: list[bytes]) -> Path:
    """Writes the images as a column of a parquet file, `ROW_GROUP` to a group, and returns the file's path."""
    table = pa.table({"image": [{"bytes": image, "path": None} for image in encoded]}, schema=FEATURES.arrow_schema)
    pq.write_table(table, path, row_group_size=ROW_GROUP)
    return path
