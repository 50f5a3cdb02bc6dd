"""Labelled batches for `transformers.Trainer` or a loop of one's own.

Shapes: B images per process and batch, G = B x processes (the global batch), C channels, h, w the model's image size,
K classes.

Batches hold "pixel_values" float32 (B, C, h, w) and "labels", and nothing else, so that they can be passed to a model
as they are.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ..images.augmentation import Mixing, Transform
from ..images.decoding import BadImageError, decode_image
from ..order import augmentation_seed, mixing_seed
from ..sources.base import ImageSource, Row
from .loaders import BatchPlan
from .randomness import random_state_kept, seed_random_state
from .supervised import BadImages, SupervisedLoader, SupervisedSamples, TrainingLoader

IGNORED_LABEL = -100  # losses and metrics leave it out


class ClassificationLoader(TrainingLoader):
    """Augmented, mixed and labelled batches; the mixing, too, is a function of (seed, epoch), and of B.

    Args:
        source: an `ImageSource` with labels.
        transform: uint8 (C, H, W) -> float32 (C, h, w), drawing only from the default generators of torch, Python and
            numpy.
        num_channels: C.
        label_map: int64, the model's label for each label of the source; None: the same.
        mixing: what `augmentation.mixing` returns; with it labels are float32 (B, K), else int64 (B,).
        seed: of order, augmentation and mixing.
        options: what else `TrainingLoader` takes.

    Raises:
        ValueError: while reading, an image without a label of the map; see also `TrainingLoader`.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        transform: Transform,
        num_channels: int,
        label_map: np.ndarray | None = None,
        mixing: Mixing | None = None,
        seed: int = 0,
        **options: Any,
    ):
        samples = partial(
            LabelledSamples, source, label_map=label_map, transform=transform, num_channels=num_channels, seed=seed
        )
        super().__init__(source, samples, MixedBatch(mixing, seed), seed=seed, **options)


class ClassificationEvaluationLoader(SupervisedLoader):
    """Every image once, in order.

    All processes get the same number of batches, all of one size: global batch b is rows b G to (b + 1) G, and process
    r takes rows r B to (r + 1) B of it, so that gathered results are in the source's order. Beyond the last image,
    and for images that cannot be decoded, batches hold black images with label -100. Labels are int64 (B,).

    Arguments are as for `ClassificationLoader`, but that `batch_size` is B; a random transform gets its numbers by the
    index of the image alone.

    Raises:
        ValueError: while reading, an image without a label of the map.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        transform: Transform,
        num_channels: int,
        batch_size: int,
        label_map: np.ndarray | None = None,
        num_processes: int = 1,
        process_index: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        first_row = process_index * batch_size
        starts = range(first_row, first_row + len(source), num_processes * batch_size)
        super().__init__(
            LabelledEvaluationSamples(source, label_map=label_map, transform=transform, num_channels=num_channels),
            batch_sampler=[range(start, start + batch_size) for start in starts],
            collate_fn=stack,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )


class LabelledSample(NamedTuple):
    """One image of a training batch, and what the mixing of its batch depends on."""

    pixel_values: torch.Tensor  # float32 (C, h, w)
    label: int
    epoch: int
    index: int  # type: ignore[assignment]  # nobody asks a sample for tuple's method


class LabelledSamples(SupervisedSamples):
    """Augmented images with their labels."""

    source: ImageSource

    def __init__(self, source: ImageSource, plan: BatchPlan, *, label_map: np.ndarray | None, **options: Any):
        super().__init__(source, plan, **options)
        self.label_map = label_map

    def _sample(self, epoch: int, index: int, row: Row) -> LabelledSample:
        decoded = self._decode_or_substitute(index, row)
        label = class_of(self.source, decoded.index, decoded.target, self.label_map)
        return LabelledSample(self._augment(epoch, index, decoded.image), label, epoch, index)


class LabelledEvaluationSamples(Dataset[Any]):
    """Images in order with their labels; indexed by ranges of rows, which may reach beyond the last image."""

    def __init__(self, source: ImageSource, *, label_map: np.ndarray | None, transform: Transform, num_channels: int):
        self.source, self.label_map, self.transform, self.num_channels = source, label_map, transform, num_channels
        self.bad_images = BadImages(source, "left out")
        black = transform(torch.zeros(num_channels, 1, 1, dtype=torch.uint8))  # (C, h, w)
        self.padding = black, IGNORED_LABEL

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, rows: range) -> list[tuple[torch.Tensor, int]]:
        with random_state_kept():
            return [self._sample(row) if row < len(self) else self.padding for row in rows]

    def _sample(self, index: int) -> tuple[torch.Tensor, int]:
        encoded, label = self.source.read(index)
        label = class_of(self.source, index, label, self.label_map)
        try:
            image = decode_image(encoded, self.num_channels)
        except BadImageError:
            self.bad_images.add(index)
            return self.padding
        seed_random_state(augmentation_seed(0, 0, index))
        return self.transform(image), label


class MixedBatch:
    """Collates a training batch; mixing is a function of (seed, epoch, first index of the batch)."""

    def __init__(self, mixing: Mixing | None, seed: int):
        self.mixing, self.seed = mixing, seed

    def __call__(self, samples: list[LabelledSample]) -> dict[str, torch.Tensor]:
        batch = stack(samples)
        if self.mixing is None:
            return batch
        with random_state_kept():
            seed_random_state(mixing_seed(self.seed, samples[0].epoch, samples[0].index))
            pixel_values, labels = self.mixing(batch["pixel_values"], batch["labels"])
        return {"pixel_values": pixel_values, "labels": labels}


def stack(samples: Sequence[tuple[Any, ...]]) -> dict[str, torch.Tensor]:
    """Collates tuples that begin with an image and a label."""
    return {
        "pixel_values": torch.stack([sample[0] for sample in samples]),  # (B, C, h, w)
        "labels": torch.tensor([sample[1] for sample in samples]),  # (B,)
    }


def class_of(source: ImageSource, index: int, label: int | None, label_map: np.ndarray | None) -> int:
    """Returns the model's label of a row that was read with `label`.

    Raises:
        ValueError: the row has no label, or one that is not in the map; names the row.
    """
    if label is None or label < 0:
        raise ValueError(f"{source.describe(index)} has no label: take a labelled split, or see --label_column_name")
    if label_map is None:
        return label
    if label >= len(label_map):
        raise ValueError(
            f"{source.describe(index)} has label {label}, but the label list ends with {len(label_map) - 1}"
        )
    return int(label_map[label])
