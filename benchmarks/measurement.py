"""What a benchmark has measured: tables for people, bars for the project, and where and when it was."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from mimae.jobs.results import device_name, package_versions, source_commit


@dataclass(frozen=True)
class Bar:
    """What is promised, and what was measured of it.

    Args:
        bar: in words.
        target: the least that is promised, or with `at_most` the most.
        figure: what was measured; None: not on this machine.
        unit: of both: "x", "%", "s", "images/s".
        note: what else should be known.
    """

    bar: str
    target: float
    figure: float | None
    unit: str = "x"
    at_most: bool = False
    note: str = ""

    @property
    def is_met(self) -> bool:
        """Whether it was measured and holds."""
        if self.figure is None:
            return False
        return self.figure <= self.target if self.at_most else self.figure >= self.target


@dataclass(frozen=True)
class Table:
    """Rows under a title; the first column names what a row is about."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True)
class Measurement:
    """Of one benchmark, on one machine."""

    what: str
    tables: list[Table] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)


def record_of(name: str, measurement: Measurement, device: torch.device) -> dict[str, Any]:
    """A measurement with its circumstances, as JSON holds it."""
    return {
        "benchmark": name,
        "command": f"python -m mimae.benchmarks {name}",
        "date": date.today().isoformat(),
        "commit": source_commit() or "unknown",
        "device": device_name(device),
        "versions": package_versions(),
        **dataclasses.asdict(measurement),
    }


def write_record(folder: Path, record: dict[str, Any], device: torch.device) -> Path:
    """Keeps it, in the place of an older one of the same kind of device."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['benchmark']}-{device.type}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def markdown_table(table: Table) -> list[str]:
    """A table as lines of Markdown."""
    lines = ["| " + " | ".join(map(str, table.columns)) + " |", "|---" * len(table.columns) + "|"]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in table.rows]
    return [*lines, "", table.note] if table.note else lines


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
