"""Shards of unequal size, fewer shards than processes, bad images, odd ones."""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mimae.data.images.decoding import decode_image
from mimae.data.images.transforms import pretraining_transform
from mimae.training.jsonl import read_jsonl

from .apparatus import sets
from .apparatus.comparing import GLOBAL_BATCH_SIZE, compare, figures_of, killed_once, reference
from .apparatus.runs import Run
from .outcome import Outcome

EPOCHS = 3
BAD_EVERY = 100


def uneven_shards(folder: Path, sizes: Sequence[int]) -> Outcome:
    """Two processes stream shards that do not divide among them."""
    shards = sets.write_parquet(folder / "shards", sets.encoded_digits(), sizes)
    flags = {"data_files": shards, "streaming": True, "cache_dir": folder / "cache", "num_train_epochs": EPOCHS}
    run = Run(folder / "run", {**flags, "per_device_train_batch_size": GLOBAL_BATCH_SIZE // 2}, 2).finish()
    counts = Counter(run.record.samples())
    left_out = sum(sizes) - len(counts) // EPOCHS
    reported = f"{left_out} images of each epoch, others in each, are left out" in run.log()
    return Outcome(
        drill=f"2 processes, streamed shards of {' + '.join(map(str, sizes))} images",
        passed=max(counts.values()) == 1 and left_out == sum(sizes) % GLOBAL_BATCH_SIZE and reported,
        figures={
            "most often that a sample came in an epoch": max(counts.values()),
            "left out of an epoch": left_out,
            "reported": reported,
        },
    )


def bad_images(folder: Path, num_images: int = sets.NUM_IMAGES) -> Outcome:
    """One image in a hundred is bad; a run is killed among them and resumed; then a limit is set below them."""
    images, bad = with_bad_ones(sets.encoded_digits()[:num_images])
    steps = 2 * (len(images) // GLOBAL_BATCH_SIZE)
    flags: dict[str, Any] = {"train_dir": sets.write_folder(folder / "images", images), "cache_dir": folder / "cache"}
    # the last checkpoint lies some bad images before the kill
    flags |= {"checkpointing_steps": steps * 4 // 11, "max_bad_image_fraction": 0.02}
    whole = reference(folder / "whole", steps, **flags)
    killed = killed_once(folder / "killed", whole, after=steps * 2 // 3)
    strict = Run(folder / "strict", {**whole.flags, "max_bad_image_fraction": 0.005})
    strict.start()
    (code,) = strict.wait()
    reports = read_jsonl(killed.output_dir / "bad_images.jsonl")
    named = sorted(Path(report["image"].rstrip(")")).name for report in reports)
    met = [f"{number:05d}.png" for number in sorted(set(bad) & {index for _, index in killed.record.samples()})]
    counted = int(max(killed.series("bad_images").values()))
    comparison = compare(killed, whole)
    return Outcome(
        drill="1 % of the images truncated, empty, HTML or a decompression bomb; 1 % with broken EXIF or a wrong name",
        passed=(named == met and counted == len(met) and reports == read_jsonl(whole.output_dir / "bad_images.jsonl"))
        and (comparison.equal and code == 1 and "max_bad_image_fraction" in strict.log()),
        figures={
            "bad ones met": len(met),
            "counted": counted,
            "named, and no other": named == met,
            "exit code above the limit": code,
            **figures_of([comparison]),
        },
    )


def with_bad_ones(images: Sequence[bytes]) -> tuple[list[bytes], list[int]]:
    """Replaces every so many-th image by a bad one, and the one after it by an odd one; returns which are bad."""
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, format="PNG")
    bad_ways: tuple[Callable[[bytes], bytes], ...] = (
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"<html><body>404 Not Found</body></html>",
        lambda content: bomb.getvalue(),
    )
    odd_ways = (
        lambda content: sets.encoded(Image.open(io.BytesIO(content)), "JPEG", exif=b"Exif\0\0broken"),
        lambda content: sets.encoded(Image.open(io.BytesIO(content)), "GIF"),  # in a file called .png
    )
    changed, bad = list(images), list(range(BAD_EVERY // 2, len(images) - 1, BAD_EVERY))
    for turn, number in enumerate(bad):
        changed[number] = bad_ways[turn % len(bad_ways)](images[number])
        changed[number + 1] = odd_ways[turn % len(odd_ways)](images[number + 1])
    return changed, bad


def odd_formats(folder: Path) -> Outcome:
    """Decodes one image of each odd kind, then trains on all of them."""
    files = odd_files()
    wrong = [name for name, (content, expected) in files.items() if not shows(content, expected)]
    images = [content for content, _ in files.values()]
    flags: dict[str, Any] = {"train_dir": sets.write_folder(folder / "images", images), "cache_dir": folder / "cache"}
    flags |= {"num_channels": 3, "per_device_train_batch_size": len(files), "max_train_steps": 3}
    bad = Run(folder / "run", flags).finish().series("bad_images")
    return Outcome(
        drill=f"odd images: {', '.join(files)}",
        passed=not wrong and max(bad.values()) == 0,
        figures={"kinds": len(files), "as defined": len(files) - len(wrong), "counted as bad": int(max(bad.values()))},
    )


def shows(content: bytes, expected: torch.Tensor) -> bool:
    """Whether an image decodes to these pixels (3, H, W), and is cropped to what a model takes."""
    pixels = decode_image(content, 3)
    transform = pretraining_transform((16, 16), min_scale=0.2, horizontal_flip=True, interpolation="bicubic")
    same = pixels.shape == expected.shape and (pixels.int() - expected.int()).abs().max() <= 1
    return bool(same) and transform(pixels).shape == (3, 16, 16)


def odd_files() -> dict[str, tuple[bytes, torch.Tensor]]:
    """Image files, and the pixels (3, H, W) that each stands for."""
    palette = Image.new("P", (4, 4), 7)
    palette.putpalette([0] * 21 + [10, 200, 30])
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    upright = np.zeros((4, 8, 3), dtype=np.uint8)
    upright[:, :4] = 255  # the left half; turned by a quarter to the right it is the upper one
    turned = Image.Exif()
    turned[0x0112] = 6
    panorama = np.tile(np.arange(20_000) % 256, (8, 1)).astype(np.uint8)
    sixteen_bits = Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16))
    return {
        "CMYK": (sets.encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), plain(255, 0, 0)),
        "L": (sets.encoded(Image.new("L", (4, 4), 100), "PNG"), plain(100, 100, 100)),
        "P": (sets.encoded(palette, "PNG"), plain(10, 200, 30)),
        "LA": (sets.encoded(Image.new("LA", (4, 4), (100, 0)), "PNG"), plain(255, 255, 255)),
        "RGBA": (sets.encoded(Image.new("RGBA", (4, 4), (200, 0, 0, 51)), "PNG"), plain(244, 204, 204)),
        "16-bit grey": (sets.encoded(sixteen_bits, "PNG"), plain(128, 128, 128)),
        "EXIF rotation": (
            sets.encoded(Image.fromarray(upright), "PNG", exif=turned),
            torch.from_numpy(np.rot90(upright, k=-1).copy()).permute(2, 0, 1),
        ),
        "GIF": (sets.encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), plain(255, 0, 0)),
        "1 x 1": (sets.encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), plain(1, 2, 3, size=1)),
        "20,000 px wide": (
            sets.encoded(Image.fromarray(panorama), "PNG"),
            torch.from_numpy(panorama).expand(3, -1, -1),
        ),
    }


def plain(*colour: int, size: int = 4) -> torch.Tensor:
    """One colour: uint8 (3, size, size)."""
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, size, size)
