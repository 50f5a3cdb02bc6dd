"""What is done: a line for each stage of each run, beside the page that is made of it."""

from datetime import date
from pathlib import Path
from typing import Any

from mimae.jobs.results import package_versions, source_commit
from mimae.training.jsonl import append_jsonl, read_jsonl

from .plan import Run


class Records:
    """The results of one scale.

    Args:
        path: `<scale>.jsonl`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lines = read_jsonl(path)

    def picture(self, run: Run) -> Path:
        """Where the reconstructions of a run are kept."""
        return self.path.with_name(f"{self.path.stem}-{run.arm.name}.png")

    def find(self, run: Run, stage: str) -> dict[str, Any] | None:
        """The newest line of a stage with the settings that it would have now."""
        wanted = (str(run), stage, run.settings(stage))
        fitting = [line for line in self.lines if (line["run"], line["stage"], line["settings"]) == wanted]
        return fitting[-1] if fitting else None

    def add(
        self, run: Run, stage: str, outcome: dict[str, Any], *, operations: float, seconds: float, device: str
    ) -> None:
        """Keeps what came of a stage, and what it cost: floating-point operations, seconds, on which device."""
        line = {
            "run": str(run),
            "stage": stage,
            "settings": run.settings(stage),
            **outcome,
            "operations": operations,
            "seconds": round(seconds, 1),
            "device": device,
            "date": date.today().isoformat(),
            "commit": source_commit() or "unknown",
            "versions": package_versions(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_jsonl(self.path, [line])
        self.lines.append(line)
