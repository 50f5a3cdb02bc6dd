"""Streamed shards: row groups of parquet files and runs of tar members, read at random, locally or over a network.

A shard is listed once (a parquet footer; the headers of a tar), in parallel threads, and the listing is kept on disk.
Files are opened by `remote`, which handles `hf://` and `http(s)://` and retries what fails.
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Features, config
from datasets.utils.logging import get_logger

from ..words import some
from .base import ImageSource, Row
from .remote import UnreadableFileError, open_shard

SAMPLES_PER_TAR_BLOCK = 256
FILES_KEPT_OPEN = 8
LISTING_THREADS = 16
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# WebDataset's rule: the key is everything up to the first dot of the base name, the field what follows it.
MEMBER_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")
logger = get_logger(__name__)

T = TypeVar("T")


class Shards(NamedTuple):
    """Files of one kind, and where their listings are kept."""

    files: list[str]  # paths or URLs
    identities: Sequence[tuple[str, ...]] | None  # they change with the file (time, ETag); None: no listing is kept
    cache_dir: str | os.PathLike[str] | None  # default: the cache of 🤗 Datasets

    def map(self, list_file: Callable[[str], T]) -> list[T]:
        """Applies a function to all files, in parallel threads."""
        logger.info(f"Listing the contents of {len(self.files)} file(s), once: {some(self.files, 3)}")
        with ThreadPoolExecutor(LISTING_THREADS) as threads:
            return list(threads.map(list_file, self.files))

    def listing(self, kind: str, list_file: Callable[[str], tuple[np.ndarray, ...]]) -> list[tuple[np.ndarray, ...]]:
        """For each file what `list_file` gives, from disk if the same, unchanged files had a listing of this kind."""
        if self.identities is None:
            return self.map(list_file)
        key = hashlib.sha256(repr([kind, list(zip(self.files, self.identities, strict=True))]).encode()).hexdigest()
        path = Path(self.cache_dir or config.HF_DATASETS_CACHE) / "mimae_listings" / f"{key}.npz"
        if not path.exists():
            _write_atomically(path, self.map(list_file))
        with np.load(path, allow_pickle=False) as stored:
            width = len(stored.files) // len(self.files)
            return [tuple(stored[f"{n}.{part}"] for part in range(width)) for n in range(len(self.files))]


class ShardedSource(ImageSource):
    """Files made of blocks that are read whole. Rows are numbered file by file, block by block.

    Args:
        blocks_per_file: for each file the sizes of its blocks, in rows.
    """

    reads_blocks = True

    def __init__(
        self, shards: Shards, blocks_per_file: Sequence[Sequence[int] | np.ndarray], label_names: list[str] | None
    ):
        self.shards, self.files, self.label_names = shards, shards.files, label_names
        self.name = some(self.files, 3)
        self.block_sizes = np.concatenate([np.asarray(sizes, dtype=np.int64) for sizes in blocks_per_file])
        self.block_ends = np.cumsum(self.block_sizes)
        self.block_files = np.repeat(np.arange(len(self.files)), [len(sizes) for sizes in blocks_per_file])
        self.file_starts = np.cumsum([0, *(int(np.sum(sizes)) for sizes in blocks_per_file)])
        self._opened: dict[str, Any] = {}
        self._process = os.getpid()
        if len(self) == 0:
            raise ValueError(f"the files hold no image: {self.name}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}

    def open_file(self, path: str) -> Any:
        """Opens a shard for `opened`."""
        return open_shard(path)

    def opened(self, path: str) -> Any:
        """Returns an open shard; each process has its own few, for a forked one may not share file positions."""
        if self._process != os.getpid():
            self._opened, self._process = {}, os.getpid()
        if path not in self._opened:
            if len(self._opened) == FILES_KEPT_OPEN:
                self._opened.pop(next(iter(self._opened))).close()
            self._opened[path] = self.open_file(path)
        return self._opened[path]

    def read(self, index: int) -> Row:
        return self.read_block(int(self.block_of(index)), np.array([index]))[0]

    def describe(self, index: int) -> str:
        number = self._file_of(index)
        return f"{self.files[number]}:{index - self.file_starts[number]}"

    def next_in_file(self, index: int) -> int:
        number = self._file_of(index)
        return int(index + 1 if index + 1 < self.file_starts[number + 1] else self.file_starts[number])

    def _file_of(self, index: int) -> int:
        return int(np.searchsorted(self.file_starts, index, side="right")) - 1


class ParquetSource(ShardedSource):
    """Row groups of parquet files. Holds the row group that was read last.

    Args:
        columns: the names of the image column and, where there are labels, of theirs.
    """

    def __init__(self, shards: Shards, columns: list[str], label_names: list[str] | None):
        listing = shards.listing("parquet", _list_row_groups)
        super().__init__(shards, [rows for rows, _ in listing], label_names)
        self.columns, self.has_labels = columns, len(columns) > 1
        self.fingerprint = _fingerprint(self.files, listing, columns)
        # number of each block within its file
        self.row_groups = np.concatenate([np.arange(len(rows)) for rows, _ in listing])
        self._last: tuple[int, list[pa.ChunkedArray]] | tuple[None, None] = (None, None)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_last": (None, None)}

    def open_file(self, path: str) -> pq.ParquetFile:
        return _open_parquet(super().open_file(path), path)

    def read_block(self, block: int, rows: np.ndarray) -> list[Row]:
        columns = self.read_row_group(block)
        first = self.block_ends[block] - self.block_sizes[block]
        images = [_encoded(columns[0][int(row - first)].as_py()) for row in rows]
        labels = [columns[1][int(row - first)].as_py() for row in rows] if self.has_labels else [None] * len(rows)
        return list(zip(images, labels, strict=True))

    def read_row_group(self, block: int) -> list[pa.ChunkedArray]:
        """Returns the columns of one row group, from memory if it is the one read last."""
        if self._last[0] != block:
            path = self.files[self.block_files[block]]
            file, group = self.opened(path), int(self.row_groups[block])
            with _damage_named(path):
                table = file.read_row_group(group, columns=self.columns, use_threads=False)
            self._last = (block, [table.column(name) for name in self.columns])
        return self._last[1]

    def _stored_labels(self) -> np.ndarray:
        """Reads only the label column of each file, and keeps it as the listing is kept."""
        kind = f"parquet labels {self.columns[1]}"
        listing = self.shards.listing(kind, lambda path: (integers(_read_parquet(path, self.columns[1]).column(0)),))
        return np.concatenate([labels for (labels,) in listing])

    def _stored_file_names(self) -> list[str | None]:
        tables = self.shards.map(lambda path: _read_parquet(path, f"{self.columns[0]}.path"))
        return [name for table in tables for name in _paths(table)]


class TarSource(ShardedSource):
    """Samples of WebDataset archives: members that share a name up to the first dot.

    A sample without an image becomes an empty image, which counts as a bad one.

    Args:
        image_fields: member extensions that hold the image, the first present one is taken.
        label_field: extension that holds an integer, or None.
    """

    def __init__(
        self, shards: Shards, image_fields: tuple[str, ...], label_field: str | None, label_names: list[str] | None
    ):
        kind = f"tar {image_fields} {label_field}"
        listing = shards.listing(kind, lambda path: _list_samples(path, image_fields, label_field))
        counts = [len(offsets) for offsets, _, _ in listing]
        sizes = [np.diff([*range(0, count, SAMPLES_PER_TAR_BLOCK), count]) for count in counts]
        super().__init__(shards, sizes, label_names)
        self.offsets, self.lengths, self._labels = (np.concatenate(parts) for parts in zip(*listing, strict=True))
        self.has_labels = label_field is not None
        self.fingerprint = _fingerprint(self.files, listing, [])

    def read_block(self, block: int, rows: np.ndarray) -> list[Row]:
        file = self.opened(self.files[self.block_files[block]])
        return [(self._read_member(file, row), int(self._labels[row]) if self.has_labels else None) for row in rows]

    def _read_member(self, file: BinaryIO, row: int) -> bytes:
        file.seek(int(self.offsets[row]))
        content = file.read(int(self.lengths[row]))
        if len(content) < self.lengths[row]:
            raise ValueError(f"{self.describe(row)} is cut short: the file is not the one that was listed")
        return content

    def _stored_labels(self) -> np.ndarray:
        return self._labels

    def _stored_file_names(self) -> list[str | None]:
        keys = self.shards.map(lambda path: dict.fromkeys(key for key, *_ in _members(path)))
        return [key for keys_of_file in keys for key in keys_of_file]


def parquet_features(path: str) -> Features:
    """Returns the `datasets.Features` of a parquet file, from its schema."""
    with open_shard(path) as file:
        return Features.from_arrow_schema(_open_parquet(file, path).schema_arrow)


def integers(column: pa.ChunkedArray) -> np.ndarray:
    """Returns a column of integers as int64 (rows,), -1 where a cell is empty."""
    return column.cast(pa.int64()).fill_null(-1).to_numpy()


def tar_fields(path: str) -> list[str]:
    """Returns the member extensions of an archive's first sample."""
    _, members = next(groupby(_members(path), key=lambda member: member[0]), (None, []))
    return [field for _, field, *_ in members]


def _members(path: str, read_field: str | None = None) -> Iterator[tuple[str, str, tarfile.TarInfo, bytes | None]]:
    """Yields (sample key, field, member, content or None) of each file in an uncompressed archive."""
    try:
        with open_shard(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                name = MEMBER_NAME.match(member.name)
                if member.isreg() and name and not os.path.basename(member.name).startswith("__"):
                    reader = archive.extractfile(member) if name[2].lower() == read_field else None
                    yield name[1], name[2].lower(), member, reader.read() if reader else None
                archive.members = []  # type: ignore[attr-defined]  # typeshed lacks it; else it remembers them all
    except tarfile.ReadError as error:
        raise ValueError(
            f"{path} cannot be read as an uncompressed tar ({error}); a compressed one works without --streaming"
        ) from error


def _list_samples(
    path: str, image_fields: tuple[str, ...], label_field: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns offsets, lengths (bytes) and labels of an archive's samples: three int64 arrays."""
    samples: dict[str, list[Any]] = {}
    for key, field, member, content in _members(path, read_field=label_field):
        sample = samples.setdefault(key, [0, 0, None])
        if field in image_fields and sample[1] == 0:
            sample[:2] = member.offset_data, member.size
        elif content is not None:
            sample[2] = _integer(content, path, member.name)
    for key, (_, _, label) in samples.items():
        if label_field is not None and label is None:
            raise ValueError(f"sample {key!r} of {path} has no .{label_field} member to take its label from")
    columns = np.array([[o, n, -1 if label is None else label] for o, n, label in samples.values()], dtype=np.int64)
    offsets, lengths, labels = columns.reshape(-1, 3).T
    return offsets, lengths, labels


def _integer(content: bytes, path: str, name: str) -> int:
    try:
        return int(content)
    except ValueError as error:
        raise ValueError(f"member {name} of {path} is no label: it must hold one integer") from error


def _list_row_groups(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows and uncompressed bytes of a parquet file's row groups: two int64 arrays."""
    with open_shard(path) as file:
        footer = _open_parquet(file, path).metadata
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    rows = np.array([group.num_rows for group in groups], dtype=np.int64)
    return rows, np.array([group.total_byte_size for group in groups], dtype=np.int64)


def _read_parquet(path: str, column: str) -> pa.Table:
    """Reads one column of a file, and nothing else of it."""
    with open_shard(path) as file:
        parquet = _open_parquet(file, path)
        with _damage_named(path):
            return parquet.read(columns=[column])


def _paths(table: pa.Table) -> list[str | None]:
    """Takes the file names out of a table of image cells; cells that are bare bytes have none."""
    if table.num_columns == 0:
        return [None] * table.num_rows
    return pc.struct_field(table.column(0), "path").to_pylist()


def _open_parquet(file: BinaryIO, path: str) -> pq.ParquetFile:
    with _damage_named(path):
        return pq.ParquetFile(file, pre_buffer=True)


@contextmanager
def _damage_named(path: str) -> Iterator[None]:
    """Adds the file's name to pyarrow's errors about its content; errors of a network have it already."""
    try:
        yield
    except UnreadableFileError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no parquet file or a damaged one, fetch it again: {error}") from error


def _write_atomically(path: Path, listing: list[tuple[np.ndarray, ...]]) -> None:
    named: dict[str, Any] = {f"{n}.{part}": each for n, parts in enumerate(listing) for part, each in enumerate(parts)}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(unfinished, **named)
    unfinished.replace(path)


def _fingerprint(files: Sequence[str], listing: list[tuple[np.ndarray, ...]], columns: list[str]) -> str:
    """Names and contents as listed, without folders: the same shards elsewhere are the same data."""
    digest = hashlib.sha256(repr(columns).encode())
    for file, arrays in zip(files, listing, strict=True):
        digest.update(os.path.basename(file).encode() + b"\0" + b"".join(array.tobytes() for array in arrays))
    return digest.hexdigest()


def _encoded(value: dict[str, Any] | bytes | None) -> bytes:
    """Takes the bytes out of an image cell; a cell without bytes is an empty file, which no decoder accepts."""
    return (value.get("bytes") if isinstance(value, dict) else value) or b""
