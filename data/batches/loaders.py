"""Batches for training and evaluation.

Shapes: B images per process and batch, G = B x processes (the global batch), C channels, h, w the model's image size.

Training batches stand in the order of `SampleOrder`: batch b of an epoch is order[b * G : (b + 1) * G], and process r
takes rows r * B to (r + 1) * B of it. Crop, flip and noise of a sample are functions of (seed, epoch, index). So what
is seen depends neither on processes nor on workers nor on where a run was interrupted, and (epoch, position) is all
the state there is.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from ..images.decoding import BadImageError, decode_image
from ..order import SampleOrder, augmentation_seed, sample_noise
from ..sources.base import ImageSource, Row, RowSource
from .randomness import random_state_kept, seed_random_state, seed_torch
from .workers import GuestLoader

logger = logging.getLogger(__name__)

MOST_BAD_IN_A_ROW = 1000  # with more, a file is given up


class BatchRequest(NamedTuple):
    """One global batch: the epoch, and how many images of it come before the batch."""

    epoch: int
    position: int


class BatchPlan:
    """Which rows each batch of one process takes.

    Args:
        order: the `SampleOrder`.
        samples_used: images per epoch, a multiple of the global batch.
        stride: this many processes' workers take batches in turn; a worker sees every `stride`-th one.
    """

    def __init__(
        self,
        order: SampleOrder,
        *,
        per_device_batch_size: int,
        global_batch_size: int,
        process_index: int,
        samples_used: int,
        stride: int,
    ):
        self.order, self.samples_used, self.stride = order, samples_used, stride
        self.batch_size, self.global_batch_size = per_device_batch_size, global_batch_size
        self.first_row = process_index * per_device_batch_size

    def requests(self, epoch: int, position: int) -> Iterator[BatchRequest]:
        """Yields the global batches from there on, without end."""
        while True:
            yield from self.requests_of_epoch(epoch, position)
            epoch, position = epoch + 1, 0

    def requests_of_epoch(self, epoch: int, position: int = 0) -> Iterator[BatchRequest]:
        """Yields the global batches from there on to the end of the epoch."""
        for start in range(position, self.samples_used, self.global_batch_size):
            yield BatchRequest(epoch, start)

    def rows(self, request: BatchRequest) -> np.ndarray:
        """Returns the sample indices that this process takes of a batch: int64 (B,)."""
        start = request.position + self.first_row
        return self.order.slice(request.epoch, start, start + self.batch_size)

    def upcoming(self, request: BatchRequest) -> np.ndarray:
        """Returns the rows of this batch and of the worker's next ones, to the end of the window it reaches into."""
        last = request.position + self.first_row + self.batch_size - 1
        end = min(self.order.window_end(request.epoch, last), self.samples_used)
        starts = range(request.position, end, self.stride * self.global_batch_size)
        return np.concatenate([self.rows(BatchRequest(request.epoch, start)) for start in starts])


class BlockReader:
    """Reads every block once per epoch, keeping of it just the rows that this worker has yet to use.

    The rows kept are those of one window, of two at a boundary: over all workers of all processes at most
    2 x max(shuffle_window, largest block) encoded images, and in each worker the one block that was read last.
    """

    def __init__(self, source: RowSource, plan: BatchPlan):
        self.source, self.plan = source, plan
        self.kept: dict[int, Row] = {}

    def __call__(self, request: BatchRequest) -> list[Row]:
        indices = self.plan.rows(request)
        missing = [index for index in indices.tolist() if index not in self.kept]
        if missing:
            self._read_blocks(self.source.block_of(np.array(missing)), self.plan.upcoming(request))
        return [self.kept.pop(index) for index in indices.tolist()]

    def _read_blocks(self, blocks: np.ndarray, upcoming: np.ndarray) -> None:
        blocks_of_upcoming = self.source.block_of(upcoming)
        for block in np.unique(blocks).tolist():
            rows = np.sort(upcoming[blocks_of_upcoming == block])
            self.kept.update(zip(rows.tolist(), self.source.read_block(block, rows), strict=True))


class DecodedRow(NamedTuple):
    """The pixels and the target of a row, or those of its substitute and what was wrong with the row itself."""

    image: torch.Tensor  # uint8 (C, H, W)
    target: Any  # a label, None, or what else the source's rows have
    index: int  # type: ignore[assignment]  # of the row that this is; tuple's method is not needed
    reason: str | None = None


def decode_or_substitute(
    source: RowSource, index: int, row: Row, decode: Callable[[int, Row], tuple[torch.Tensor, Any]]
) -> DecodedRow:
    """Decodes a row that was read; in the place of a bad one stands the next good one of its file.

    Args:
        decode: (index, row) -> (image, target); raises BadImageError.

    Raises:
        RuntimeError: none of the images that follow can be decoded either.
    """
    try:
        return DecodedRow(*decode(index, row), index)
    except BadImageError as error:
        reason = error.reason
    substitute = index
    for _ in range(MOST_BAD_IN_A_ROW):
        substitute = source.next_in_file(substitute)
        if substitute == index:
            break
        try:
            return DecodedRow(*decode(substitute, source.read(substitute)), substitute, reason)
        except BadImageError:
            continue
    raise RuntimeError(
        f"neither {source.describe(index)} ({reason}) nor any image after it in its file can be decoded; "
        "remove the file from the data set, or fetch it again"
    )


class OrderedSamples(Dataset[Any], ABC):
    """The DataLoader's view of a source: indexed by `BatchRequest`, it gives the samples of this process's part.

    Args:
        transform: uint8 (C, H, W) -> (C, h, w), drawing from the default generators of torch, Python and numpy; they
            are seeded for each sample by (seed, epoch, index), and the caller's numbers stay where they were.
            Where targets are transformed, too: (image, target) -> (image, target).
    """

    seed_generators = staticmethod(seed_random_state)  # those that the transform draws from

    def __init__(
        self, source: RowSource, plan: BatchPlan, *, transform: Callable[..., Any], num_channels: int, seed: int
    ):
        self.source, self.plan, self.transform = source, plan, transform
        self.num_channels, self.seed = num_channels, seed
        self.read_blocks = BlockReader(source, plan) if source.reads_blocks else None

    def __len__(self) -> int:
        """Images of an epoch, over all processes."""
        return self.plan.samples_used

    def __getitems__(self, request: BatchRequest) -> list[Any]:
        indices = self.plan.rows(request).tolist()
        rows = self.read_blocks(request) if self.read_blocks else map(self.source.read, indices)
        with random_state_kept():
            return [self._sample(request.epoch, index, row) for index, row in zip(indices, rows, strict=True)]

    @abstractmethod
    def _sample(self, epoch: int, index: int, row: Row) -> Any:
        """Makes a sample of a row that was read."""

    def _decode(self, index: int, row: Row) -> tuple[torch.Tensor, Any]:
        """Pixels and target of a row. Raises: BadImageError."""
        return decode_image(row[0], self.num_channels), row[1]

    def _decode_or_substitute(self, index: int, row: Row) -> DecodedRow:
        return decode_or_substitute(self.source, index, row, self._decode)

    def _augment(self, epoch: int, index: int, *inputs: Any) -> Any:
        self.seed_generators(augmentation_seed(self.seed, epoch, index))
        return self.transform(*inputs)


class PretrainingSamples(OrderedSamples):
    """Images with the noise that their masks are cut from; the transform draws from torch's default generator only."""

    seed_generators = staticmethod(seed_torch)

    def __init__(self, source: ImageSource, plan: BatchPlan, *, noise_shape: tuple[int, ...], **options: Any):
        super().__init__(source, plan, **options)
        self.noise_shape = noise_shape

    def _sample(self, epoch: int, index: int, row: Row) -> dict[str, Any]:
        decoded = self._decode_or_substitute(index, row)
        return {
            "pixel_values": self._augment(epoch, index, decoded.image),
            "index": index,
            "epoch": epoch,
            "bad_image": None if decoded.reason is None else self._bad_image(epoch, index, decoded),
        }

    def _bad_image(self, epoch: int, index: int, decoded: DecodedRow) -> dict[str, Any]:
        return {
            "image": self.source.describe(index),
            "index": index,
            "epoch": epoch,
            "reason": decoded.reason,
            "substitute": self.source.describe(decoded.index),
        }

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Stacks the samples of a process's batch, and draws their noise: at one go, not between two images.

        A worker stacks straight into the memory that it shares with its caller.
        """
        noise = [torch.from_numpy(self._noise(sample["epoch"], sample["index"])) for sample in samples]
        return {
            "pixel_values": default_collate([sample["pixel_values"] for sample in samples]),  # (B, C, h, w)
            "noise": default_collate(noise),  # (B, *noise_shape)
            "index": torch.tensor([sample["index"] for sample in samples]),
            "epoch": torch.tensor([sample["epoch"] for sample in samples]),
            "bad_images": [sample["bad_image"] for sample in samples if sample["bad_image"]],
        }

    def _noise(self, epoch: int, index: int) -> np.ndarray:
        return sample_noise(self.seed, epoch, index, self.noise_shape)


class PretrainingLoader:
    """Endless batches for pre-training, the same whatever the number of processes and workers.

    Args:
        source: an `ImageSource`.
        transform: module, uint8 (C, H, W) -> uint8 (C, h, w), drawing from torch's default generator only; it is
            seeded for each sample, and the caller's numbers stay where they were.
        num_channels: C.
        noise_shape: shape of the noise that one sample's masks are cut from.
        per_device_batch_size: B.
        images_per_step: images per optimiser step over all processes, a multiple of G; default G. What is left of an
            epoch after its last whole step is dropped; another epoch drops other images.
        num_processes, process_index: of the distributed run.
        seed: of order, augmentation and noise.
        num_workers: processes that read and decode; 0: the caller's own.
        shuffle_window: how many rows of a sharded source are shuffled together, see `SampleOrder`; with it the
            encoded images that are held grow, see `BlockReader`.
        samples_per_epoch: an epoch is this many images, drawn anew each time; default all.
        pin_memory: copy batches to page-locked memory, for asynchronous copies to a GPU.

    Every worker reads every block of a sharded source that it needs a row of, so a stream is read up to
    `num_workers * num_processes` times per epoch: for a slow network keep workers few.

    Raises:
        ValueError: a number that cannot be; fewer images than one step takes.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        transform: torch.nn.Module,
        num_channels: int,
        noise_shape: tuple[int, ...],
        per_device_batch_size: int,
        images_per_step: int | None = None,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        shuffle_window: int = 8192,
        samples_per_epoch: int | None = None,
        pin_memory: bool = False,
    ):
        self.source, self.process_index, self.seed = source, process_index, seed
        self.per_device_batch_size, self.num_workers, self.pin_memory = per_device_batch_size, num_workers, pin_memory
        self.sample_options: dict[str, Any] = {
            "transform": transform,
            "num_channels": num_channels,
            "noise_shape": noise_shape,
        }
        self.global_batch_size = per_device_batch_size * num_processes
        self.images_per_step = images_per_step or self.global_batch_size
        self.num_samples = len(source) if samples_per_epoch is None else samples_per_epoch
        self._check_numbers()
        self.samples_used = self.num_samples // self.images_per_step * self.images_per_step
        self.order = SampleOrder(source.block_sizes, seed, shuffle_window)

    def _check_numbers(self) -> None:
        if self.num_samples > len(self.source):
            raise ValueError(
                f"samples_per_epoch is {self.num_samples}, but the data set has {len(self.source)} images"
            )
        if self.images_per_step % self.global_batch_size:
            raise ValueError(
                f"images_per_step ({self.images_per_step}) must be a multiple of the global batch, "
                f"{self.global_batch_size}"
            )
        if self.num_samples < self.images_per_step:
            raise ValueError(
                f"an epoch of {self.num_samples} images is smaller than one step of {self.images_per_step}: "
                "lower per_device_train_batch_size or gradient_accumulation_steps"
            )

    def batches(self, epoch: int = 0, position: int = 0) -> Iterator[dict[str, Any]]:
        """Yields batches from there on, going on into the next epochs without end.

        Args:
            position: images of the epoch that all processes together have consumed; a multiple of G.

        Yields:
            dict of "pixel_values" uint8 (B, C, h, w), "noise" float32 (B, *noise_shape), "index" int64 (B,), "epoch"
            int64 (B,), and "bad_images", a list, mostly empty, of dicts with "image", "index", "epoch", "reason" and
            "substitute".

        Raises:
            ValueError: a position that is no batch boundary of the epoch.
            RuntimeError: no image of a file can be decoded.
        """
        if position % self.global_batch_size or not 0 <= position <= self.samples_used:
            raise ValueError(
                f"position {position} is no batch boundary: it must be a multiple of {self.global_batch_size}, "
                f"at most {self.samples_used}"
            )
        plan = BatchPlan(
            self.order,
            per_device_batch_size=self.per_device_batch_size,
            global_batch_size=self.global_batch_size,
            process_index=self.process_index,
            samples_used=self.samples_used,
            stride=max(1, self.num_workers),
        )
        requests: Any = plan.requests(epoch, position)  # torch says lists of indices
        samples = PretrainingSamples(self.source, plan, seed=self.seed, **self.sample_options)
        # The stream never ends, so neither do its workers: nothing would be gained by persistent_workers.
        return iter(
            GuestLoader(
                samples,
                batch_sampler=requests,
                collate_fn=samples.collate,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
            )
        )


class EvaluationSamples(Dataset[Any]):
    """Indexed by lists of sample indices; what cannot be decoded is named instead."""

    def __init__(self, source: ImageSource, *, transform: torch.nn.Module, num_channels: int):
        self.source, self.transform, self.num_channels = source, transform, num_channels

    def __getitems__(self, indices: list[int]) -> tuple[list[torch.Tensor], list[int], list[str]]:
        images, labels, bad_images = [], [], []
        for index in indices:
            encoded, label = self.source.read(index)
            try:
                images.append(self.transform(decode_image(encoded, self.num_channels)))  # (C, h, w)
                labels.append(-1 if label is None else label)
            except BadImageError as error:
                bad_images.append(f"{self.source.describe(index)}: {error.reason}")
        return images, labels, bad_images


def evaluation_batches(
    source: ImageSource,
    *,
    indices: Sequence[int] | np.ndarray | None = None,
    transform: torch.nn.Module,
    num_channels: int,
    batch_size: int,
    num_workers: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the images in order, once; those that cannot be decoded are left out and counted in a warning.

    Args:
        indices: the samples wanted, default all.
        transform: module, uint8 (C, H, W) -> uint8 (C, h, w).

    Yields:
        dict of "pixel_values" uint8 (B, C, h, w) and "labels" int64 (B,), -1 where there is no label.
    """
    indices = np.arange(len(source)) if indices is None else np.asarray(indices)
    loader = GuestLoader(
        EvaluationSamples(source, transform=transform, num_channels=num_channels),
        batch_sampler=[indices[start : start + batch_size].tolist() for start in range(0, len(indices), batch_size)],
        collate_fn=tuple,
        num_workers=num_workers,
    )
    bad_images = []
    for images, labels, bad in loader:
        bad_images += bad
        if images:
            yield {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}
    if bad_images:
        logger.warning("%d image(s) could not be decoded and were left out: %s", len(bad_images), bad_images[:10])
