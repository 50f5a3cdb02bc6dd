"""What a drill has shown."""

from dataclasses import dataclass, field
from typing import Any


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
