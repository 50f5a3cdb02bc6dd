"""What the processes of a run have written down of it, read back."""

import hashlib
import json
from pathlib import Path
from typing import Any


class Record:
    """The record of one run, over all its starts and processes.

    Args:
        folder: with a `<rank>.jsonl` for each process; see `recording`.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def lines(self, rank: int = 0) -> list[dict[str, Any]]:
        """All of one process. A last line that is cut off is left out."""
        path = self.folder / f"{rank}.jsonl"
        content = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith("\n")]

    def passes(self, rank: int = 0) -> list[dict[str, Any]]:
        """The forward passes of one process."""
        return [line for line in self.lines(rank) if "step" in line]

    def num_passes(self) -> int:
        """How many forward passes the main process has done."""
        path = self.folder / "0.jsonl"
        return path.read_bytes().count(b'"step"') if path.exists() else 0

    def weights_by_step(self, rank: int) -> dict[int, str]:
        """Digests of a process's weights after each step."""
        return {line["updated"]: line["weights"] for line in self.lines(rank) if "updated" in line}

    def seen(self) -> dict[int, list[list[Any]]]:
        """What counts of each step: epoch, index, noise and crop of its images in global order, pass by pass.

        As they were seen the last time, and whatever the number of processes: images of a forward pass follow one
        another by rank.
        """
        ranks = sorted(int(path.stem) for path in self.folder.glob("*.jsonl"))
        lines = [(rank, line) for rank in ranks for line in self.passes(rank)]
        newest: dict[int, int] = {}  # step -> the last start that did it
        for _, line in lines:
            newest[line["step"]] = max(line["start"], newest.get(line["step"], 0))
        passes: dict[int, dict[int, list[Any]]] = {step: {} for step in sorted(newest)}
        for rank, line in lines:
            if line["start"] == newest[line["step"]]:
                passes[line["step"]].setdefault(rank, []).append(line)
        return {step: _in_global_order(list(of_step.values())) for step, of_step in passes.items()}

    def samples(self) -> list[tuple[int, int]]:
        """Epoch and index of all images, in the order in which they counted."""
        return [image[:2] for passes in self.seen().values() for images in passes for image in images]

    def order_hash(self) -> str:
        """Of that order."""
        return hashlib.sha256(json.dumps(self.samples()).encode()).hexdigest()[:12]

    def most_redone(self) -> int:
        """The most steps that any start had to do once more."""
        most = newest = 0
        start = -1
        for line in self.passes():
            if line["start"] != start:
                most, start = max(most, newest - line["step"] + 1), line["start"]
            newest = line["step"]
        return most

    def first_passes(self) -> dict[int, float]:
        """When each start that got so far ended its first forward and backward pass."""
        first: dict[int, float] = {}
        for line in self.passes():
            first.setdefault(line["start"], line["time"])
        return first

    def steps_by_start(self) -> dict[int, list[int]]:
        """The steps that each start has done, in full or in part."""
        steps: dict[int, list[int]] = {}
        for line in self.passes():
            steps.setdefault(line["start"], []).append(line["step"])
        return steps

    def deaths_inside_saves(self) -> int:
        """How many starts have begun a save that they did not end."""
        last = {line["start"]: line for line in self.lines()}
        return sum("saving" in line for line in last.values())


def _in_global_order(lines_by_rank: list[list[dict[str, Any]]]) -> list[list[Any]]:
    """The images of each forward pass, those of the first rank first."""
    return [[image for line in lines for image in _images(line)] for lines in zip(*lines_by_rank, strict=True)]


def _images(line: dict[str, Any]) -> list[tuple[int, int, str, str]]:
    each = zip(line["index"], line["noise"], line["pixels"], strict=True)
    return [(line["epoch"], *image) for image in each]
