"""What loaders with targets share: an epoch at a time, for `transformers.Trainer` or a loop of one's own.

Shapes: B images per process and batch, G = B x processes (the global batch).

The loaders know their process and must not be given to `accelerator.prepare`: a Trainer returns them from
`get_train_dataloader` and `get_eval_dataloader`.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..order import SampleOrder
from ..sources.base import Row, RowSource
from .loaders import BatchPlan, BatchRequest, DecodedRow, OrderedSamples
from .workers import GuestLoader

logger = logging.getLogger(__name__)


class SupervisedLoader(GuestLoader):
    """Names, after each epoch, the images that could not be decoded: the dataset's `bad_images`, a `BadImages`."""

    dataset: Any
    batch_sampler: Any

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names the class of its iterator
        yield from super().__iter__()
        self.dataset.bad_images.warn()

    @property
    def bad_images(self) -> list[str]:
        """Descriptions of the images that this process could not decode so far."""
        return self.dataset.bad_images.describe()


class TrainingLoader(SupervisedLoader):
    """Training batches, the same whatever the number of workers; all processes together see one order.

    What is seen is a function of (seed, epoch): the order, and the augmentation of each image. An epoch's remainder,
    smaller than G, is dropped; another epoch drops other images. A bad image is replaced by the next good one of its
    file, and its target with it.

    `set_epoch` chooses the epoch, as a Trainer does. A Trainer resumes within an epoch by
    `accelerate.skip_first_batches`, which here reads nothing of what it skips.

    Args:
        source: a `RowSource` with targets.
        make_samples: makes, from the plan of this process's batches, the samples that batches consist of.
        collate: makes a batch of a list of samples.
        seed: of the order.
        per_device_batch_size, num_processes, process_index, num_workers, shuffle_window, pin_memory: as for
            `PretrainingLoader`.

    Raises:
        ValueError: fewer images than one global batch takes.
        RuntimeError: while reading, no image of a file can be decoded.
    """

    def __init__(
        self,
        source: RowSource,
        make_samples: Callable[[BatchPlan], OrderedSamples],
        collate: Callable[[list[Any]], Any],
        *,
        per_device_batch_size: int,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        shuffle_window: int = 8192,
        pin_memory: bool = False,
    ):
        global_batch_size = per_device_batch_size * num_processes
        if len(source) < global_batch_size:
            raise ValueError(
                f"{len(source)} training images are fewer than one global batch of {global_batch_size}: lower "
                "per_device_train_batch_size"
            )
        plan = BatchPlan(
            SampleOrder(source.block_sizes, seed, shuffle_window),
            per_device_batch_size=per_device_batch_size,
            global_batch_size=global_batch_size,
            process_index=process_index,
            samples_used=len(source) // global_batch_size * global_batch_size,
            stride=max(1, num_workers),
        )
        super().__init__(
            make_samples(plan),
            batch_sampler=EpochRequests(plan),
            collate_fn=collate,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
        )

    def set_epoch(self, epoch: int) -> None:
        """The next iteration gives the batches of this epoch."""
        self.batch_sampler.set_epoch(epoch)


class SupervisedSamples(OrderedSamples):
    """Remembers the images that had to be replaced."""

    def __init__(self, source: RowSource, plan: BatchPlan, **options: Any):
        super().__init__(source, plan, **options)
        self.bad_images = BadImages(source, "replaced")

    def _decode_or_substitute(self, index: int, row: Row) -> DecodedRow:
        decoded = super()._decode_or_substitute(index, row)
        if decoded.reason is not None:
            self.bad_images.add(index)
        return decoded


class EpochRequests:
    """The batch sampler of one epoch at a time."""

    def __init__(self, plan: BatchPlan):
        self.plan, self.epoch = plan, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.plan.samples_used // self.plan.global_batch_size

    def __iter__(self) -> Iterator[BatchRequest]:
        return self.plan.requests_of_epoch(self.epoch)


class BadImages:
    """Which images could not be decoded, in memory that the workers share: one flag for each image of the source."""

    def __init__(self, source: RowSource, consequence: str):
        self.source, self.consequence = source, consequence
        self.flags = torch.zeros(len(source), dtype=torch.bool).share_memory_()
        self.warned = 0

    def add(self, index: int) -> None:
        self.flags[index] = True

    def describe(self) -> list[str]:
        return [self.source.describe(index) for index in self.flags.nonzero().flatten().tolist()]

    def warn(self) -> None:
        """Names the images, if there are more of them than at the last warning."""
        images = self.describe()
        if len(images) > self.warned:
            self.warned = len(images)
            found = f"{len(images)} image(s) could not be decoded and were {self.consequence}"
            logger.warning("%s: %s", found, images[:10])
