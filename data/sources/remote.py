"""Files, local or over a network: a read returns the right bytes, or raises an error that names the file.

🤗 Datasets knows the way to `hf://` and `http(s)://`. Its retries, though, pass over a failed opening and an answer of
the wrong length, and its time-outs are minutes. Here each read is one request for a range, and whatever fails
(connecting, a status such as 429 or 503, silence, a body that is cut or is not the range) is tried again on a file
opened anew, `datasets.config.STREAMING_READ_MAX_RETRIES` (20) times in all, `STREAMING_READ_RETRY_INTERVAL` (5)
seconds apart, or 12 times that after a 429. A missing or forbidden file is an error at once.

So an outage ends in an error after 20 x 5 s if connections are refused. If the server is silent, each try over
http(s) may wait twice for `READ_TIMEOUT`, for the HEAD and the GET of an opening: at most 20 x (2 x 30 + 5) s, 22
minutes; if it limits the rate, 20 x 60 s. `hf://` has the time-outs and retries of huggingface_hub within each try.
"""

import io
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

from datasets import DownloadConfig, config
from datasets.utils.file_utils import _prepare_path_and_storage_options, is_local_path
from fsspec.core import url_to_fs

READ_TIMEOUT = 30.0  # seconds without a byte
BLOCK_BYTES = 5 * 2**20  # the least that is asked for at once
REFUSALS = (401, 403, 404, 410)
RATE_LIMITED = 429
RATE_LIMIT_INTERVALS = 12  # rates are counted by the minute
logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class UnreadableFileError(OSError):
    """A file cannot be read over the network; the message names it and the last failure."""


def open_shard(path: str) -> BinaryIO:
    """Opens a path or URL for reading at random.

    Raises:
        UnreadableFileError: here or in a later read: the server refuses, or fails too often.
    """
    if is_local_path(path.split("::")[0]):
        return open(path, "rb")
    return io.BufferedReader(RemoteFile(path), BLOCK_BYTES)


class RemoteFile(io.RawIOBase):
    """A file at a URL of any kind that fsspec knows; each read is one request, tried again when it fails."""

    def __init__(self, url: str):
        self._url, self._position = url, 0
        # Datasets' own, though private: it knows the Hub's endpoint and token, and proxies named by the environment
        path, options = _prepare_path_and_storage_options(url, DownloadConfig(storage_options=_http_options(url)))
        self._file_system, self._path = url_to_fs(path, **options)
        self._file: BinaryIO | None = None
        self._size = self._try(_size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._size - self._position))
        if length:
            buffer[:length] = self._try(lambda file: _read_range(file, self._position, length))
            self._position += length
        return length

    def _try(self, read: Callable[[BinaryIO], Result]) -> Result:
        """The result of `read` on the open file, at the first try that succeeds."""
        attempt, tries = 0, config.STREAMING_READ_MAX_RETRIES
        while True:
            attempt += 1
            try:
                if self._file is None:
                    self._file = self._file_system.open(self._path, "rb", cache_type="none")
                return read(self._file)
            except Exception as error:  # the errors of the several network libraries have no other base in common
                self._file = None  # it may be broken for good
                status = next(filter(None, map(http_status, causes(error))), None)
                cause = error.__cause__ or error
                reason = f"{type(cause).__name__}: {cause}"
                if status in REFUSALS or (isinstance(error, FileNotFoundError) and error.__cause__ is None):
                    raise UnreadableFileError(f"{self._url} is not there or not allowed ({reason})") from error
                if attempt >= tries:
                    raise UnreadableFileError(
                        f"{self._url} could not be read in {tries} tries ({reason}): see to the network or the server"
                    ) from error
            logger.warning("%s could not be read, try %d of %d (%s)", self._url, attempt, tries, reason)
            intervals = RATE_LIMIT_INTERVALS if status == RATE_LIMITED else 1
            time.sleep(intervals * config.STREAMING_READ_RETRY_INTERVAL)


def _http_options(url: str) -> dict[str, dict[str, Any]]:
    """Time-outs for http(s); aiohttp's own are 5 minutes for a whole answer, however long."""
    if not url.split("::")[-1].startswith(("http://", "https://")):
        return {}
    import aiohttp  # slow to import, and needed by few

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=READ_TIMEOUT, sock_read=READ_TIMEOUT)
    # whatever the bytes are, a range is one of the file's own
    options = {"client_kwargs": {"timeout": timeout}, "headers": {"Accept-Encoding": "identity"}}
    return {"http": options, "https": options}


def _size(file: Any) -> int:
    if file.size is None:
        raise OSError("the server serves no ranges, or the file is empty")
    return file.size


def _read_range(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    content = file.read(length)
    if len(content) != length:
        raise OSError(f"the server sent {len(content)} bytes where {length} were asked for")
    return content


def http_status(error: BaseException) -> int | None:
    """The HTTP status that an error of aiohttp or of the Hub holds."""
    return getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those behind it, down to the first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
