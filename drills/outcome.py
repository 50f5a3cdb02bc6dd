"""What a drill has shown."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .runs import Comparison


@dataclass(frozen=True)
class Outcome:
    """One row of the table.

    Args:
        drill: what was done.
        passed: whether all that it is about holds.
        figures: what was counted and measured, by name; those of one name are added up over drills, see `report`.
        skipped: why it could not be done here.
    """

    drill: str
    passed: bool
    figures: dict[str, Any] = field(default_factory=dict)
    skipped: str | None = None


def as_list(outcomes: Outcome | list[Outcome]) -> list[Outcome]:
    """Of a drill that gives one, or some."""
    return outcomes if isinstance(outcomes, list) else [outcomes]


def compared(comparisons: Sequence[Comparison]) -> dict[str, int]:
    """The figures that say whether runs were equal to those that nothing happened to."""
    return {
        "runs compared": len(comparisons),
        "runs equal": sum(each.equal for each in comparisons),
        "samples lost": sum(each.lost for each in comparisons),
        "samples repeated": sum(each.repeated for each in comparisons),
    }
