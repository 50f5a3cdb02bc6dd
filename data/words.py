"""Lists of names in messages."""

from collections.abc import Sequence


def some(names: Sequence[object], most: int = 5) -> str:
    """The first few of the names, and how many more there are; "nothing" where there is none."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more or "nothing"
