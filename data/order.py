"""The order of the samples, the noise and the augmentation seeds: pure functions of (seed, epoch, ...).

Everything comes from numpy's Philox with the key (seed, epoch); its 256-bit counter, least significant word first,
tells the uses apart:

    [., 0, 0, 0]      permutation of the blocks
    [., k + 1, 0, 0]  permutation of the rows of window k
    [., index, 0, 1]  augmentation seed of sample `index`
    [., index, 0, 2]  noise of sample `index`
    [., index, 0, 3]  mixing seed of the batch that begins with sample `index`
    [., label, 0, 4]  permutation of the images of class `label`, in epoch 0, for low-shot subsets

Only raw Philox words are used: numpy promises that these never change from version to version, which it does not
promise of `Generator.permutation`. So an order, once drawn, can be drawn again years later.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence

AUGMENTATION, NOISE, MIXING, CLASS = 1, 2, 3, 4


class SampleOrder:
    """Which sample stands at which position of an epoch.

    The blocks (row groups, runs of archive members) are permuted over the whole epoch. Consecutive blocks are then
    gathered into windows of at most `window` rows, never less than one block, and the rows of a window are permuted.
    So a sample may come at any position of the epoch, and two samples of one block come less than
    max(window, rows of that block) positions apart. A source of one block is one window: a full permutation.

    Nothing here knows of processes or workers: they cut the same order differently.

    Args:
        block_sizes: int (blocks,), rows of each block in global index order.
        seed: non-negative integer.
        window: rows that are shuffled together.
    """

    def __init__(self, block_sizes: Sequence[int] | np.ndarray, seed: int, window: int):
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if window < 1:
            raise ValueError(f"shuffle_window must be at least 1, got {window}")
        self.block_sizes = np.asarray(block_sizes, dtype=np.int64)
        self.block_starts = np.cumsum(self.block_sizes) - self.block_sizes
        self.seed, self.window = seed, window
        # the one epoch whose layout is held: (epoch, blocks, block ends, window ends)
        self._epoch: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None
        self._windows: dict[tuple[int, int], np.ndarray] = {}  # (epoch, k) -> rows, of the two windows used last

    def __len__(self) -> int:
        return int(self.block_sizes.sum())

    def slice(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Returns the sample indices at positions start..stop of the epoch: int64 (stop - start,).

        Costs O(stop - start) within a window that was used just before, else one sort of a window; a new epoch
        costs one sort of the blocks.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"positions {start}..{stop} do not lie in an epoch of {len(self)} samples")
        window_ends = self._layout(epoch)[2]
        pieces = [np.empty(0, dtype=np.int64)]
        while start < stop:
            k = int(np.searchsorted(window_ends, start, side="right"))
            first, end = int(window_ends[k - 1]) if k else 0, min(stop, int(window_ends[k]))
            pieces.append(self._window_rows(epoch, k)[start - first : end - first])
            start = end
        return np.concatenate(pieces)

    def window_end(self, epoch: int, position: int) -> int:
        """Returns the position just after the window that holds `position`."""
        window_ends = self._layout(epoch)[2]
        return int(window_ends[np.searchsorted(window_ends, position, side="right")])

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            blocks = _permutation(len(self.block_sizes), self.seed, epoch, 0)
            block_ends = np.cumsum(self.block_sizes[blocks])
            self._epoch = (epoch, blocks, block_ends, _window_ends(block_ends, self.window))
        return self._epoch[1:]

    def _window_rows(self, epoch: int, k: int) -> np.ndarray:
        if (epoch, k) not in self._windows:
            if len(self._windows) == 2:
                del self._windows[next(iter(self._windows))]
            self._windows[epoch, k] = self._draw_window(epoch, k)
        return self._windows[epoch, k]

    def _draw_window(self, epoch: int, k: int) -> np.ndarray:
        blocks, block_ends, window_ends = self._layout(epoch)
        first, last = np.searchsorted(block_ends, [window_ends[k - 1] if k else 0, window_ends[k]], side="right")
        sizes, starts = self.block_sizes[blocks[first:last]], self.block_starts[blocks[first:last]]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        rows = np.repeat(starts, sizes) + within
        return rows[_permutation(len(rows), self.seed, epoch, k + 1)]


def augmentation_seed(seed: int, epoch: int, index: int) -> int:
    """Returns the 63-bit seed of the augmentation of one sample."""
    return _seed(seed, epoch, index, AUGMENTATION)


def mixing_seed(seed: int, epoch: int, first_index: int) -> int:
    """Returns the 63-bit seed by which a batch is mixed; `first_index` is its first sample."""
    return _seed(seed, epoch, first_index, MIXING)


def class_permutation(n: int, seed: int, label: int) -> np.ndarray:
    """Returns a permutation of the n images of a class: int64 (n,)."""
    return _permutation(n, seed, 0, label, CLASS)


def sample_noise(seed: int, epoch: int, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the noise that one sample's masks are cut from: float32 `shape`, uniform in [0, 1).

    24 random bits each, so every value is exact in float32.
    """
    bits = _raw(seed, epoch, index, NOISE, int(np.prod(shape))) >> np.uint64(40)
    return (bits.astype(np.float32) * np.float32(2**-24)).reshape(shape)


def _seed(seed: int, epoch: int, index: int, use: int) -> int:
    return int(_raw(seed, epoch, index, use, 1)[0] >> np.uint64(1))


class _Key(ISeedSequence):
    """Philox's key as it is: with `Philox(key=…)`, numpy asks the operating system for a seed first, and drops it."""

    def __init__(self, seed: int, epoch: int):
        self.words = np.array([seed, epoch], dtype=np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> np.ndarray:
        return self.words


def _raw(seed: int, epoch: int, index: int, use: int, count: int) -> np.ndarray:
    key: Any = _Key(seed, epoch)  # numpy takes any ISeedSequence, and says SeedSequence
    return np.random.Philox(key, counter=[0, index, 0, use]).random_raw(count)


def _permutation(n: int, seed: int, epoch: int, stream: int, use: int = 0) -> np.ndarray:
    return np.argsort(_raw(seed, epoch, stream, use, n), kind="stable")


def _window_ends(block_ends: np.ndarray, window: int) -> np.ndarray:
    """Cuts the epoch greedily: a window takes blocks while they fit, and always at least one."""
    ends, start, total = [], 0, int(block_ends[-1])
    while start < total:
        fits = int(np.searchsorted(block_ends, start + window, side="right")) - 1
        first = int(np.searchsorted(block_ends, start, side="right"))
        start = int(block_ends[max(fits, first)])
        ends.append(start)
    return np.array(ends, dtype=np.int64)
