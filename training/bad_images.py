"""Images that could not be decoded: named in `bad_images.jsonl`, counted once each, and a bound on their share."""

import logging
from pathlib import Path
from typing import Any

from .jsonl import append_jsonl, keep_jsonl, read_jsonl
from .processes import everywhere, on_main_process

logger = logging.getLogger(__name__)


class TooManyBadImagesError(RuntimeError):
    """More of the data set than `--max_bad_image_fraction` could not be decoded."""


class BadImageLog:
    """Collects what the workers report, and writes it when the processes meet anyway.

    A resumed run goes on in the file `path`. A run stops above `max_fraction` of its `num_images`.
    """

    def __init__(self, path: Path, *, num_images: int, max_fraction: float):
        self._path, self._num_images, self._max_fraction = path, num_images, max_fraction
        self._pending: list[dict[str, Any]] = []
        self._known: set[int] = set()
        self._keeps_all = False

    def resume(self, known: list[int] | None) -> None:
        """Of the images that the file reports, the run has met those `known`, by their indices; None: all."""
        self._known, self._keeps_all = set(known or ()), known is None

    def begin(self) -> None:
        """Opens the file, less what is not known: what was met after a checkpoint will be met again. Collective."""

        def is_kept(report: dict[str, Any]) -> bool:
            return "index" in report and (self._keeps_all or report["index"] in self._known)

        on_main_process(lambda: keep_jsonl(self._path, is_kept))  # a kill may have cut the last line
        self._known = {report["index"] for report in read_jsonl(self._path)}

    def add(self, reports: list[dict[str, Any]]) -> None:
        """Reports of one batch of this process; usually none."""
        self._pending += [report for report in reports if report["index"] not in self._known]

    @property
    def known(self) -> list[int]:
        """The bad images so far, by their indices."""
        return sorted(self._known)

    @property
    def count(self) -> int:
        """Distinct bad images so far."""
        return len(self._known)

    def flush(self) -> None:
        """All processes write down what they met, so that a checkpoint of this moment forgets none. Collective."""
        pending, self._pending = everywhere(self._pending), []
        news = {report["index"]: report for report in pending if report["index"] not in self._known}
        if news:
            on_main_process(lambda: append_jsonl(self._path, list(news.values())))
        self._known.update(news)

    def check(self) -> None:
        """After a flush.

        Raises:
            TooManyBadImagesError: on all processes alike.
        """
        if self.count > self._max_fraction * self._num_images:
            raise TooManyBadImagesError(
                f"{self.count} of {self._num_images} images cannot be decoded, more than "
                f"--max_bad_image_fraction {self._max_fraction}; {self._path.name} names them. "
                "Raise the fraction and go on with --resume_from_checkpoint latest, or mend them and start anew"
            )
