"""Files of one JSON object a line, whose last line may be cut off after a kill."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, none where there is no file; a line that is no object is skipped with a warning."""
    lines = path.read_text().splitlines() if path.exists() else []
    objects = []
    for line in lines:
        try:
            objects.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            logger.warning("passing over a broken line of %s: %.40s", path.name, line)
    return objects


def keep_jsonl(path: Path, is_kept: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrites a file, if there is one, with the objects to keep: at once or not at all."""
    if not path.exists():
        return
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(entry) + "\n" for entry in read_jsonl(path) if is_kept(entry)))
    os.replace(partial, path)


def append_jsonl(path: Path, entries: list[dict[str, Any]]) -> None:
    """Adds objects at the end. Raises: OSError, with a remedy: the disk is full, or broken."""
    try:
        with path.open("a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
    except OSError as error:
        remedy = "make room or mend the disk, then go on with --resume_from_checkpoint latest"
        raise OSError(f"could not write {path} ({error}): {remedy}") from error
