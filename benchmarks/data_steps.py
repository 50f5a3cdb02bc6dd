"""Loader and training step together: how long the step waits for images from memory, from a folder, from a stream."""

import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mimae import MIMAEConfig, MIMAEForPreTraining
from mimae.data.batches.loaders import PretrainingLoader
from mimae.data.images.transforms import IMAGENET_MEAN, IMAGENET_STD, Normalization, pretraining_transform
from mimae.data.sources.base import ImageSource
from mimae.data.sources.opening import open_image_source
from mimae.training.optimization import build_adamw

from .measurement import Table
from .measuring import settle
from .photographs import EncodedSource, jpegs, write_folder, write_parquet

PATCH_SIZES = {224: 16, 96: 8, 32: 4}  # by image size, all in pixels
QUALITY = 96


def loader_over(source: ImageSource, image_size: int, batch_size: int, **options: Any) -> PretrainingLoader:
    """Our loader, as the pre-training script has it for complementary masks: one row of noise for an image."""
    return PretrainingLoader(
        source,
        transform=pretraining_transform(image_size),
        num_channels=3,
        noise_shape=((image_size // PATCH_SIZES[image_size]) ** 2,),
        per_device_batch_size=batch_size,
        **options,
    )


def measure_steps(device: torch.device, *, quick: bool) -> tuple[Table, float, float]:
    """Loader and training step: the table, the worst share of waiting, and the worst rate beside synthetic batches."""
    on_gpu = device.type == "cuda"
    image_size, batch_size = (32, 2) if quick else (224, 256 if on_gpu else 4)
    warm_up, steps = (1, 1) if quick else (40, 60) if on_gpu else (1, 4)
    step = TrainingStep(image_size, device)
    encoded = jpegs((2 if quick else 4) * batch_size, QUALITY)
    options = {"num_workers": number_of_workers(device), "pin_memory": on_gpu}
    rows, waited, rates = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, source in sources_over(encoded, Path(folder)).items():
            batches = loader_over(source, image_size, batch_size, **options).batches()
            synthetic = itertools.repeat(step.to_device(next(batches)))
            run_steps(step, synthetic, warm_up)
            reference, _ = run_steps(step, synthetic, steps)
            run_steps(step, batches, warm_up)
            seconds, _ = run_steps(step, batches, steps)
            settled_seconds, waiting = run_steps(step, batches, steps, settled=True)
            waited.append(waiting / settled_seconds)
            rates.append(reference / seconds)
            rows.append([name, steps * batch_size / seconds, 100 * rates[-1], 100 * waited[-1]])
    columns = ("images from", "images/s", "% of a batch that lies on the device", "% of the time the step waits")
    note = (
        f"{step.name}, {batch_size} images a step, {options['num_workers']} worker(s), {steps} steps. The time that a "
        "step waits is that of asking for a batch, after the step before has ended on the device."
    )
    if not on_gpu:
        note += " On a CPU workers and step share cores and memory, and the step is the slower for it."
    return Table("Loader and training step, N = 4", columns, rows, note), max(waited), min(rates)


def number_of_workers(device: torch.device) -> int:
    """One for each core beside a GPU; one beside a step that runs on the cores itself."""
    return (os.cpu_count() or 1) if device.type == "cuda" else 1


def sources_over(encoded: list[bytes], folder: Path) -> dict[str, ImageSource]:
    """The same images from memory, from a folder of files, and from a parquet file that is streamed."""
    files = str(write_folder(folder / "files", encoded))
    shard = str(write_parquet(folder / "shard.parquet", encoded))
    cache = folder / "cache"
    return {
        "memory": EncodedSource(encoded),
        "a folder": open_image_source(train_dir=files, cache_dir=cache),
        "streamed parquet": open_image_source(data_files=shard, streaming=True, cache_dir=cache),
    }


class TrainingStep:
    """Forward, backward and optimiser as the trainer has them: float32 on a CPU, bf16 and compiled on a GPU.

    ViT-base at 224 px; at other sizes ViT-tiny, for rehearsals.
    """

    def __init__(self, image_size: int, device: torch.device):
        size = "base" if image_size == 224 else "tiny"
        patch_size = PATCH_SIZES[image_size]
        config = MIMAEConfig.preset(f"vit-{size}", image_size=image_size, patch_size=patch_size)
        self.name, self.device = f"ViT-{size} {image_size}", device
        self.model = MIMAEForPreTraining(config).to(device).train()
        self.optimizer = build_adamw(self.model, weight_decay=0.05, betas=(0.9, 0.95))
        if device.type == "cuda":
            self.model.compile()
        self.normalize = Normalization(IMAGENET_MEAN, IMAGENET_STD, device)

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch's images and noise where the model is, without waiting for them."""
        return {name: batch[name].to(self.device, non_blocking=True) for name in ("pixel_values", "noise")}

    def __call__(self, batch: dict[str, Any]) -> None:
        batch = self.to_device(batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model(self.normalize(batch["pixel_values"]), noise=batch["noise"], return_logits=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def run_steps(
    step: TrainingStep, batches: Iterator[dict[str, Any]], count: int, *, settled: bool = False
) -> tuple[float, float]:
    """Seconds of so many steps, and of asking for their batches.

    Args:
        settled: wait for the device after each step; else it runs behind, as in training, and the second figure holds
            what it hides.
    """
    settle(step.device)
    start, waited = time.perf_counter(), 0.0
    for _ in range(count):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        step(batch)
        if settled:
            settle(step.device)
    settle(step.device)
    return time.perf_counter() - start, waited
