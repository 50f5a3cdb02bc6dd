"""Images with a target for each pixel or each object, and their batches.

Shapes: B images in a batch, C channels, H, W an image's height and width, h, w those of a training crop; n objects.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from ..images.decoding import BadImageError
from ..images.transforms import DenseTransform
from ..order import augmentation_seed
from ..sources.base import Row
from ..sources.dense import DenseSource
from .randomness import random_state_kept, seed_random_state
from .supervised import BadImages, SupervisedLoader, SupervisedSamples, TrainingLoader


class DenseSample(NamedTuple):
    """An image and its target, after the transform, and its place in the source."""

    pixel_values: torch.Tensor  # float32 (C, h, w)
    target: Any
    index: int  # type: ignore[assignment]  # nobody asks a sample for tuple's method


class DenseLoader(TrainingLoader):
    """Augmented batches: dicts of "pixel_values" float32 (B, C, h, w) and "labels", which a model takes as they are.

    Labels are int64 (B, h, w) where targets are masks of classes, else the list of the targets.

    Args:
        transform: (image, target) -> (float32 (C, h, w), target), drawing only from the default generators of torch,
            Python and numpy.
        num_channels: C.
        seed: of order and augmentation.
        options: what else `TrainingLoader` takes.

    Raises:
        ValueError: see `TrainingLoader`, and while reading `DenseSource.decode`.
    """

    def __init__(
        self, source: DenseSource, *, transform: DenseTransform, num_channels: int, seed: int = 0, **options: Any
    ):
        samples = partial(DenseSamples, source, transform=transform, num_channels=num_channels, seed=seed)
        super().__init__(source, samples, collate, seed=seed, **options)


class DenseSamples(SupervisedSamples):
    """Augmented images with their targets."""

    source: DenseSource

    def _decode(self, index: int, row: Row) -> tuple[torch.Tensor, Any]:
        return self.source.decode(index, row, self.num_channels)

    def _sample(self, epoch: int, index: int, row: Row) -> DenseSample:
        decoded = self._decode_or_substitute(index, row)
        pixel_values, target = self._augment(epoch, index, decoded.image, decoded.target)
        return DenseSample(pixel_values, target, index)


class DenseEvaluationLoader(SupervisedLoader):
    """This process's part of the images, one by one: every `num_processes`-th, from `process_index` on.

    What cannot be decoded is left out and named after the pass.

    Args:
        transform: (image, target) -> (float32 (C, h, w), what an evaluation needs to know besides).
        num_processes, process_index: of the distributed run.
    """

    def __init__(
        self,
        source: DenseSource,
        *,
        transform: DenseTransform,
        num_channels: int,
        num_processes: int = 1,
        process_index: int = 0,
        num_workers: int = 0,
    ):
        super().__init__(
            DenseEvaluationSamples(source, transform=transform, num_channels=num_channels),
            sampler=range(process_index, len(source), num_processes),
            batch_size=None,
            num_workers=num_workers,
        )

    def __iter__(self) -> Iterator[DenseSample]:  # type: ignore[override]  # torch names the class of its iterator
        return filter(None, super().__iter__())


class DenseEvaluationSamples(Dataset[Any]):
    """Images with their targets by index; None in the place of one that cannot be decoded."""

    def __init__(self, source: DenseSource, *, transform: DenseTransform, num_channels: int):
        self.source, self.transform, self.num_channels = source, transform, num_channels
        self.bad_images = BadImages(source, "left out")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> DenseSample | None:
        try:
            image, target = self.source.decode(index, self.source.read(index), self.num_channels)
        except BadImageError:
            self.bad_images.add(index)
            return None
        with random_state_kept():
            seed_random_state(augmentation_seed(0, 0, index))
            return DenseSample(*self.transform(image, target), index)


def collate(samples: list[DenseSample]) -> dict[str, Any]:
    """Stacks images, and masks of classes; targets of objects stay a list, as their number differs."""
    labels: Any = [sample.target for sample in samples]
    if isinstance(labels[0], torch.Tensor):
        labels = torch.stack([mask.as_subclass(torch.Tensor) for mask in labels]).long()  # (B, h, w)
    else:
        labels = [{name: value.as_subclass(torch.Tensor) for name, value in target.items()} for target in labels]
    images = torch.stack([sample.pixel_values.as_subclass(torch.Tensor) for sample in samples])
    return {"pixel_values": images, "labels": labels}
