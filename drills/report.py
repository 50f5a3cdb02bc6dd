"""The table of all drills."""

from collections.abc import Sequence
from datetime import date
from pathlib import Path

from mimae.training.results import package_versions, source_commit

from .outcome import Outcome

REPORT = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
HEAD = """# Reliability

What `make drills` did to real runs, and what came of it; the program writes this page. "Equal" means that the samples,
crops and noise of every step and the bits of the final weights are those of the run that nothing happened to (CPU, one
thread, the model of [`drills/tiny.yaml`](../drills/tiny.yaml)).
"""


def write_report(outcomes: Sequence[Outcome]) -> None:
    """Writes `docs/reliability.md`."""
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    rows = ["| drill | passed | figures |", "|---|---|---|"]
    rows += [f"| {each.drill} | {verdict(each)} | {words(each)} |" for each in outcomes]
    facts = f"{date.today().isoformat()}, commit {source_commit()}, {versions}."
    REPORT.write_text(f"{HEAD}\n{facts}\n\n" + "\n".join(rows) + "\n", encoding="utf-8")


def verdict(outcome: Outcome) -> str:
    """In one word."""
    if outcome.skipped:
        return "skipped"
    return "yes" if outcome.passed else "**no**"


def words(outcome: Outcome) -> str:
    """The figures, or why there are none."""
    return outcome.skipped or "; ".join(f"{name}: {value}" for name, value in outcome.figures.items())
