"""Data sets that 🤗 Datasets resolves: of the Hub, local ones, folders of images, parquet and WebDataset files."""

import hashlib
import os
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetBuilder, Features, Image, Value, load_dataset_builder
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.utils.file_utils import xopen
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from .base import ImageSource
from .remote import causes, http_status
from .sharded import IMAGE_EXTENSIONS, ParquetSource, Shards, TarSource, integers, parquet_features, tar_fields

FINGERPRINTED_ROWS = 16
NO_ACCESS = (401, 403, 404)


class DatasetSource(ImageSource):
    """A map-style 🤗 data set: an Arrow table on disk, or the paths of a folder of images.

    Args:
        name: what `describe` calls rows that have no path of their own.
        image_column, label_column: their names.
    """

    def __init__(self, dataset: Dataset, *, name: str, image_column: str, label_column: str | None = None):
        columns = [image_column] if label_column is None else [image_column, label_column]
        self.dataset = dataset.select_columns(columns).cast_column(image_column, Image(decode=False))
        self.name, self.image_column, self.label_column = name, image_column, label_column
        self.label_names, self.has_labels = label_names_of(dataset.features, label_column), label_column is not None
        self.block_sizes = np.array([len(dataset)], dtype=np.int64)
        self.fingerprint = self._fingerprint()

    def read(self, index: int) -> tuple[bytes, int | None]:
        row = self.dataset[int(index)]
        return _file_bytes(row[self.image_column]), row[self.label_column] if self.has_labels else None

    def describe(self, index: int) -> str:
        path = self.dataset[int(index)][self.image_column]["path"]
        return f"{self.name}:{index}" + (f" ({path})" if path else "")

    def _stored_labels(self) -> np.ndarray:
        return integers(self._column(self.dataset.column_names[-1]))

    def _stored_file_names(self) -> list[str | None]:
        return pc.struct_field(self._column(self.image_column), "path").to_pylist()

    def _column(self, name: str) -> pa.ChunkedArray:
        """Returns a column as it lies on disk, mapped into memory."""
        return self.dataset.select_columns([name]).with_format("arrow")[:].column(name)

    def _fingerprint(self) -> str:
        """Columns, length and a few whole rows; hashing every image would read the whole set at each start."""
        digest = hashlib.sha256(repr([len(self), self.image_column, self.label_column]).encode())
        for index in np.linspace(0, len(self) - 1, num=min(FINGERPRINTED_ROWS, len(self)), dtype=np.int64):
            encoded, label = self.read(index)
            digest.update(hashlib.sha256(encoded).digest() + repr(label).encode())
        return digest.hexdigest()


def open_dataset(
    name: str,
    place: dict[str, Any],
    *,
    split: str,
    streaming: bool,
    columns: tuple[str | None, str | None],
    cache_dir: str | os.PathLike[str] | None,
) -> ImageSource:
    """Opens what 🤗 Datasets' `load_dataset(**place)` would, as an `ImageSource`.

    Args:
        name: what the user called it, for messages.
        columns: (image column, label column) as the user named them, each may be None.

    Raises:
        ValueError: no access, no such split, no such column, a kind of file that cannot be streamed, no image.
    """
    with explained_access(name):
        builder = load_dataset_builder(**place, cache_dir=cache_dir)
        if split not in (splits := _splits(builder)):
            raise ValueError(f"{name} has no split {split!r}; it has {splits}")
        if streaming:
            return _open_shards(name, builder, split, columns, cache_dir)
        builder.download_and_prepare()
        if builder.info.splits[split].num_examples == 0:
            raise ValueError(f"split {split!r} of {name} is empty")
        dataset = builder.as_dataset(split)
    image, label = find_columns(dataset.features, *columns, name=name)
    return DatasetSource(dataset, name=f"{name}[{split}]", image_column=image, label_column=label)


def dataset_splits(name: str, place: dict[str, Any], cache_dir: str | os.PathLike[str] | None) -> list[str]:
    """The splits of what `open_dataset` would open. Raises: ValueError, without access."""
    with explained_access(name):
        return _splits(load_dataset_builder(**place, cache_dir=cache_dir))


def _splits(builder: DatasetBuilder) -> list[str]:
    return [str(key) for key in builder.info.splits or builder.config.data_files or ()]


def _open_shards(
    name: str,
    builder: DatasetBuilder,
    split: str,
    columns: tuple[str | None, str | None],
    cache_dir: str | os.PathLike[str] | None,
) -> ParquetSource | TarSource:
    resolved = builder.config.data_files[split]
    files = [str(file) for file in resolved]
    # Without a modification time or an ETag nobody could tell a stale listing from a good one.
    shards = Shards(files, resolved.origin_metadata if all(resolved.origin_metadata) else None, cache_dir)
    suffixes = {PurePosixPath(file).suffix.lower() for file in files}
    features = builder.info.features
    if suffixes == {".parquet"}:
        features = features or parquet_features(files[0])
        image, label = find_columns(features, *columns, name=name)
        return ParquetSource(shards, [image, label] if label else [image], label_names_of(features, label))
    if suffixes == {".tar"}:
        images, label = find_tar_fields(tar_fields(files[0]), *columns, name=name)
        return TarSource(shards, images, label, label_names_of(features or {}, label))
    raise ValueError(
        f"{name} cannot be streamed: only .parquet or .tar shards can be read at random, and split {split!r} holds "
        f"{sorted(suffixes)}; drop --streaming to convert it once, on disk"
    )


def find_columns(
    features: Features, image_column: str | None, label_column: str | None, *, name: str
) -> tuple[str, str | None]:
    """Returns the names of the image and the label column (None without labels), by name or by type.

    Raises:
        ValueError: a named column is not there or is no label; no image column can be told. Lists the columns.
    """
    image = image_column or _first(features, Image) or _present(features, "image")
    label = label_column or _first(features, ClassLabel) or _present(features, "label") or _present(features, "cls")
    if image is None or image not in features:
        wanted = f"image column {image!r}" if image else "column of images"
        raise ValueError(f"{name} has no {wanted}; its columns are {list(features)}: set --image_column_name")
    if label_column and label not in features:
        raise ValueError(
            f"{name} has no label column {label!r}; its columns are {list(features)}: set --label_column_name"
        )
    if label and not _holds_integers(features[label]):
        if label_column:
            raise ValueError(f"column {label!r} of {name} holds {features[label]}; labels must be integers")
        label = None
    return image, label


def find_tar_fields(
    fields: list[str], image_column: str | None, label_column: str | None, *, name: str
) -> tuple[tuple[str, ...], str | None]:
    """Returns the extensions that may hold the image and the one that holds the label (None without labels)."""
    images = (image_column,) if image_column else IMAGE_EXTENSIONS
    label = label_column or _present(fields, "cls")
    if not set(images) & set(fields):
        raise ValueError(f"{name} has no member {images} in its first sample, which has {fields}")
    if label and label not in fields:
        raise ValueError(f"{name} has no label member {label!r} in its first sample, which has {fields}")
    return images, label


@contextmanager
def explained_access(name: str) -> Iterator[None]:
    """Turns what the libraries raise on 401, 403 and 404, and on broken files, into a message that says what to do."""
    try:
        yield
    except Exception as error:
        if _is_refusal(error):
            message = (
                f"cannot open the data set {name!r}: {str(error).splitlines()[0]}\n"
                f"Its page is {constants.ENDPOINT}/datasets/{name} (a gated data set asks for consent there). "
                "If it exists and you may see it, log in with `hf auth login`; else correct --dataset_name."
            )
        elif isinstance(error, DatasetGenerationError):
            message = f"{name} cannot be converted; mend or remove the file at fault: {error.__cause__}"
        else:
            raise
        raise ValueError(message) from error


def _is_refusal(error: BaseException) -> bool:
    """Whether the Hub's 401, 403 or 404 stands anywhere in the chain of causes; the libraries wrap it variously."""
    return any(
        isinstance(link, DatasetNotFoundError) or (isinstance(link, HfHubHTTPError) and http_status(link) in NO_ACCESS)
        for link in causes(error)
    )


def label_names_of(features: Mapping[Any, Any], label_column: str | None) -> list[str] | None:
    """The names of the labels, if the column has any."""
    return getattr(features.get(label_column), "names", None)


def _first(features: Features, kind: type) -> str | None:
    return next((column for column, feature in features.items() if isinstance(feature, kind)), None)


def _present(names: Container[str], name: str) -> str | None:
    return name if name in names else None


def _holds_integers(feature: object) -> bool:
    return isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "int" in feature.dtype)


def _file_bytes(cell: dict[str, Any] | None) -> bytes:
    if cell is None:
        return b""
    if cell["bytes"] is None and cell["path"]:
        with xopen(os.fspath(cell["path"]), "rb") as file:
            return file.read()
    return cell["bytes"] or b""
