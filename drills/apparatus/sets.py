"""The digits as people keep their images: folders, parquet shards, WebDataset archives; some of them damaged."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NUM_IMAGES = 1_437  # as many as the embedded training digits
SHARDS = (500, 137, 300, 500)
ROWS_PER_GROUP = 64
WINDOW = 256  # images that are shuffled together: some blocks, not all
KINDS = ("map-style", "folder", "streamed parquet", "streamed WebDataset")


def flags_of(kind: str, folder: Path) -> dict[str, Any]:
    """Writes the digits into `folder` as one of `KINDS`; returns the flags that read them."""
    if kind == "map-style":
        return {}
    images, cache = encoded_digits(), {"cache_dir": folder / "cache"}
    if kind == "folder":
        return {"train_dir": write_folder(folder / "images", images), **cache}
    write = write_parquet if kind == "streamed parquet" else write_archives
    shards = write(folder / "shards", images, SHARDS)
    return {"data_files": shards, "streaming": True, "shuffle_window": WINDOW, **cache}


def encoded_digits() -> list[bytes]:
    """PNGs of 8 x 8 grey pixels."""
    pixels = np.round(load_digits().images[:NUM_IMAGES] * 255 / 16).astype(np.uint8)
    return [encoded(Image.fromarray(image), "PNG") for image in pixels]


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def write_folder(folder: Path, images: Sequence[bytes]) -> Path:
    """A file for each image."""
    folder.mkdir(parents=True)
    for number, content in enumerate(images):
        (folder / f"{number:05d}.png").write_bytes(content)
    return folder


def write_parquet(folder: Path, images: Sequence[bytes], sizes: Sequence[int]) -> str:
    """Shards of these sizes, as on the Hub; returns a pattern that names them."""
    folder.mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image()})
    for shard, part in enumerate(cut(images, sizes)):
        rows = [{"image": {"bytes": content, "path": None}} for content in part]
        path = folder / f"train-{shard:05d}.parquet"
        datasets.Dataset.from_list(rows, features=features).to_parquet(path, batch_size=ROWS_PER_GROUP)
    return str(folder / "*.parquet")


def write_archives(folder: Path, images: Sequence[bytes], sizes: Sequence[int]) -> str:
    """WebDataset archives of these sizes; returns a pattern that names them."""
    folder.mkdir(parents=True)
    for shard, part in enumerate(cut(images, sizes)):
        write_tar(
            folder / f"train-{shard:05d}.tar", {f"{number:06d}.png": part[number] for number in range(len(part))}
        )
    return str(folder / "*.tar")


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """An archive of these members, whatever their names."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def cut(images: Sequence[bytes], sizes: Sequence[int]) -> list[Sequence[bytes]]:
    """Cuts the first images into parts of these sizes."""
    ends = np.cumsum(sizes).tolist()
    return [images[end - size : end] for size, end in zip(sizes, ends, strict=True)]
