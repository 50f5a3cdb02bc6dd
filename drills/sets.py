"""The digits as people keep their images: folders, parquet shards, WebDataset archives; some of them damaged."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NUM_IMAGES = 1_437  # as many as the embedded training digits


def encoded_digits(file_format: str = "PNG") -> list[bytes]:
    """Encoded grey images of 8 x 8 pixels."""
    encoded = []
    for image in load_digits().images[:NUM_IMAGES]:
        buffer = io.BytesIO()
        Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)).save(buffer, format=file_format)
        encoded.append(buffer.getvalue())
    return encoded


def write_folder(folder: Path, images: Sequence[bytes]) -> Path:
    """A file for each image."""
    folder.mkdir(parents=True)
    for number, content in enumerate(images):
        (folder / f"{number:05d}.png").write_bytes(content)
    return folder


def write_parquet(folder: Path, images: Sequence[bytes], sizes: Sequence[int], rows_per_group: int = 64) -> str:
    """Shards of these sizes, as on the Hub; returns a pattern that names them."""
    folder.mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image()})
    ends = np.cumsum(sizes)
    for shard, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        rows = [{"image": {"bytes": content, "path": None}} for content in images[start:end]]
        part = datasets.Dataset.from_list(rows, features=features)
        part.to_parquet(folder / f"train-{shard:05d}.parquet", batch_size=rows_per_group)
    return str(folder / "*.parquet")


def write_archives(folder: Path, images: Sequence[bytes], sizes: Sequence[int]) -> str:
    """WebDataset archives of these sizes; returns a pattern that names them."""
    folder.mkdir(parents=True)
    ends = np.cumsum(sizes)
    for shard, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        with tarfile.open(folder / f"train-{shard:05d}.tar", "w") as archive:
            for number in range(start, end):
                member = tarfile.TarInfo(f"{number:06d}.png")
                member.size = len(images[number])
                archive.addfile(member, io.BytesIO(images[number]))
    return str(folder / "*.tar")


def damage(images: Sequence[bytes], every: int) -> tuple[list[bytes], list[int]]:
    """Damages every so many-th image, in turn in four ways; returns all images, and which are damaged."""
    bomb = io.BytesIO()
    Image.new("1", (40_000, 40_000)).save(bomb, format="PNG")
    ways = (
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"<html><body>404 Not Found</body></html>",
        lambda content: bomb.getvalue(),
    )
    numbers = list(range(every // 2, len(images), every))
    damaged = list(images)
    for turn, number in enumerate(numbers):
        damaged[number] = ways[turn % len(ways)](images[number])
    return damaged, numbers
