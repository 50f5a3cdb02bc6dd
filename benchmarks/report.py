"""`docs/performance.md`: the bars first, then every table, from the records that were kept."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from .measurement import Bar, Table, markdown_table

HEAD = """# Performance

What `make bench` has measured. The program writes this page from the records in [`performance/`](performance);
`python -m mimae.benchmarks NAME` replaces the records of one benchmark for the same kind of device. Contestants take
turns within one run. Figures are medians; ratios are medians over the rounds (in tables of steps: ratios of medians).
On a CPU shared with other work, absolute times mean little, but ratios hold. The end of the page explains the bars
that are not met and what was tried for speed.
"""
MEASURED_ON = "measured on"
NOTES = "notes.md"  # kept by hand


def write_page(folder: Path, page: Path) -> None:
    """Writes the page anew from all records of the folder, and the notes that stand there."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    notes = folder / NOTES
    text = page_of(records)
    if notes.exists():
        text += "\n" + notes.read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")


def page_of(records: list[dict[str, Any]]) -> str:
    """What was measured, as Markdown."""
    lines = [HEAD, "## Bars", "", *markdown_table(table_of_bars(records)), ""]
    for benchmark, group in groupby(records, key=lambda record: record["benchmark"]):
        lines += [f"## {benchmark}", ""]
        for record in group:
            lines += [f"{record['what']} {circumstances(record)}", ""]
            for table in (Table(**fields) for fields in record["tables"]):
                lines += [f"### {table.title}", "", *markdown_table(table), ""]
    return "\n".join(lines).rstrip() + "\n"


def table_of_bars(records: list[dict[str, Any]]) -> Table:
    """Each bar once: with its figure, if any machine has measured it."""
    rows: dict[str, list[Any]] = {}
    for record in records:
        for bar in (Bar(**fields) for fields in record["bars"]):
            if bar.figure is not None or bar.bar not in rows:
                rows[bar.bar] = row_of_bar(bar, record)
    return Table("Bars", ("bar", "promised", "measured", "met", MEASURED_ON, "note"), list(rows.values()))


def row_of_bar(bar: Bar, record: dict[str, Any]) -> list[Any]:
    """A bar's row: what is promised, what was measured, and where."""
    promise = f"{'at most' if bar.at_most else 'at least'} {bar.target:g} {bar.unit}"
    if bar.figure is None:
        return [bar.bar, promise, "not measured", "-", "-", bar.note]
    where = f"{record['device']}, {record['date']}, {record['commit'][:7]}, `{record['command']}`"
    return [bar.bar, promise, f"{bar.figure:.3g} {bar.unit}", "yes" if bar.is_met else "**no**", where, bar.note]


def circumstances(record: dict[str, Any]) -> str:
    """Where, when and with what it was measured."""
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    commit = record["commit"]
    return (
        f"({record['device']}; {record['date']}; commit {commit[:7]}{commit[40:]}; {versions}; `{record['command']}`.)"
    )
