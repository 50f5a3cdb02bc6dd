"""Shards of unequal size, fewer shards than processes, bad images."""

import json
from collections import Counter
from pathlib import Path

from . import sets
from .kills import reference
from .outcome import Outcome
from .runs import Run

EPOCHS = 3


def uneven_shards(folder: Path, sizes: tuple[int, ...]) -> Outcome:
    """Two processes stream shards that do not divide among them."""
    images = sets.encoded_digits()[: sum(sizes)]
    shards = sets.write_parquet(folder / "shards", images, sizes)
    flags = {"data_files": shards, "streaming": True, "cache_dir": str(folder / "cache")}
    run = Run(folder / "run", {**flags, "num_train_epochs": EPOCHS, "per_device_train_batch_size": 32}, 2).finish()
    per_epoch = images_of_epochs(run)
    most = max(max(Counter(images).values()) for images in per_epoch.values())
    left_out = {len(images) - len(seen) for seen in per_epoch.values()}
    return Outcome(
        drill=f"2 processes, streamed shards of {', '.join(map(str, sizes))} images",
        passed=most == 1 and len(per_epoch) == EPOCHS and left_out == {len(images) % 64},
        figures={"most often in an epoch": most, "left out of an epoch": left_out.pop()},
    )


def images_of_epochs(run: Run) -> dict[int, list[int]]:
    """The indices of each epoch's images, over all processes."""
    images: dict[int, list[int]] = {}
    for rank in range(run.num_processes):
        for line in run.passes(rank):
            images.setdefault(line["epoch"], []).extend(line["index"])
    return images


def bad_images(folder: Path) -> Outcome:
    """One image in a hundred is bad; a run is killed among them and resumed; then a limit is set below them."""
    images, numbers = sets.damage(sets.encoded_digits(), every=100)
    flags = {"train_dir": str(sets.write_folder(folder / "images", images)), "cache_dir": str(folder / "cache")}
    steps = 2 * (len(images) // 64)
    whole = reference(folder / "whole", steps, max_bad_image_fraction=0.02, **flags)
    killed = Run(folder / "killed", whole.flags)
    killed.start()
    killed.wait_for_passes(steps // 2)
    killed.kill()
    killed.wait()
    killed.finish()
    strict = Run(folder / "strict", {**whole.flags, "max_bad_image_fraction": 0.005})
    strict.start()
    (code,) = strict.wait()
    named = sorted({Path(json.loads(line)["image"].rstrip(")")).name for line in bad_image_lines(killed)})
    expected = [f"{number:05d}.png" for number in numbers]
    return Outcome(
        drill="1 % of the images truncated, empty, HTML or a decompression bomb",
        passed=killed.equals(whole) and set(named) <= set(expected) and code == 1 and "bad" in strict.log(),
        figures={
            "bad": len(expected),
            "named": len(named),
            "equal": killed.equals(whole),
            "exit code above limit": code,
        },
    )


def bad_image_lines(run: Run) -> list[str]:
    """What the run has written of them."""
    return (run.output_dir / "bad_images.jsonl").read_text().splitlines()
