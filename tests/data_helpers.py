"""Real photographs in every wrapping the data tests need."""

import gzip
import io
import struct
import tarfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features
from datasets import Image as ImageFeature
from PIL import Image
from skimage import data as photographs

from mimae.data.batches.loaders import PretrainingLoader
from mimae.data.images.transforms import pretraining_transform

FEATURES = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "coffee", "astronaut"])})


@lru_cache
def photograph(name="chelsea"):
    return Image.fromarray(getattr(photographs, name)())


def encode(image, file_format="JPEG", **options):
    content = io.BytesIO()
    image.save(content, file_format, **options)
    return content.getvalue()


@lru_cache
def jpegs(count):
    """`count` different crops of photographs, 40 to 70 pixels a side."""
    generator = np.random.default_rng(0)
    crops = []
    for number in range(count):
        image = photograph(("chelsea", "coffee", "astronaut")[number % 3])
        width, height = generator.integers(40, 71, 2)
        left, top = generator.integers(0, image.width - width), generator.integers(0, image.height - height)
        crops.append(encode(image.crop((left, top, left + width, top + height)), quality=95))
    return crops


def write_parquet(folder, shards, row_group_size=8):
    """Writes lists of encoded images as shard-N.parquet and returns the paths."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for number, images in enumerate(shards):
        cells = {
            "image": [{"bytes": image, "path": None} for image in images],
            "label": [row % 3 for row in range(len(images))],
        }
        paths.append(str(Path(folder, f"shard-{number}.parquet")))
        pq.write_table(pa.table(cells, schema=FEATURES.arrow_schema), paths[-1], row_group_size=row_group_size)
    return paths


def write_tars(folder, shards):
    """Writes lists of encoded images as shard-N.tar, each with its label, and returns the paths."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for number, images in enumerate(shards):
        paths.append(str(Path(folder, f"shard-{number}.tar")))
        with tarfile.open(paths[-1], "w") as archive:
            for row, image in enumerate(images):
                for name, content in ((f"{row:05d}.jpg", image), (f"{row:05d}.cls", str(row % 3).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return paths


def shards(*sizes):
    images, start, cut = jpegs(sum(sizes)), 0, []
    for size in sizes:
        cut.append(images[start : start + size])
        start += size
    return cut


def pretraining_loader(source, **options):
    defaults = {
        "transform": pretraining_transform(32),
        "num_channels": 3,
        "noise_shape": (16,),
        "per_device_batch_size": 8,
        "seed": 3,
        "shuffle_window": 20,
    }
    return PretrainingLoader(source, **(defaults | options))


def take(batches, count):
    return [next(batches) for _ in range(count)]


def write_idx(path, values, compress=False):
    """An array of bytes in the format of MNIST's files."""
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    content = header + values.tobytes()
    path.write_bytes(gzip.compress(content) if compress else content)


def write_idx_folder(folder, compress, split="train", count=5):
    folder.mkdir(exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (count, 3, 4), dtype=np.uint8)
    labels = np.arange(count, dtype=np.uint8)
    suffix = ".gz" if compress else ""
    write_idx(folder / f"{split}-images-idx3-ubyte{suffix}", images, compress)
    write_idx(folder / f"{split}-labels-idx1-ubyte{suffix}", labels, compress)
    return images, labels
