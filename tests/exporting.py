"""Exports for tests."""

from typing import Any

from mimae.hub.export import export, load_source


def export_checkpoint(checkpoint: Any, out: Any, to: str, *, overwrite: bool = False, **known: Any) -> float:
    """As `python -m mimae.hub.export` makes them; returns the largest difference of an output."""
    difference, _ = export(load_source(checkpoint, **known), out, to, overwrite=overwrite)
    return difference
