"""The page of all drills, from the outcomes that were kept."""

import json
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

from mimae.training.results import package_versions, source_commit

from .outcome import Outcome
from .saving import SHARE

DOCS = Path(__file__).resolve().parents[1] / "docs"
OUTCOMES, REPORT = DOCS / "reliability.json", DOCS / "reliability.md"
HEAD = """# Reliability

What `make drills` did to real runs of `run_mim_pretrain.py`, and what came of it. The program writes this page;
`python -m mimae.drills NAME` does one drill again and puts its row in the place of the older one. A run is *equal* if
the samples, crops and noise of every step and the bits of the final weights are those of the run that nothing happened
to (CPU, one thread, float32, the same number of processes; the model is that of
[`drills/tiny.yaml`](../drills/tiny.yaml), on scikit-learn's digits, unless a row says otherwise).
"""

Row = dict[str, Any]


def keep(name: str, outcomes: Iterable[Outcome], seconds: float) -> None:
    """Puts what came of a drill in the place of what came of it before, and writes the page anew."""
    kept = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {}
    facts = {"date": date.today().isoformat(), "commit": source_commit(), "seconds": round(seconds)}
    kept[name] = [{**vars(outcome), **facts} for outcome in outcomes]
    OUTCOMES.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    REPORT.write_text(page(kept), encoding="utf-8")


def page(kept: dict[str, list[Row]]) -> str:
    """All of it, as Markdown."""
    rows = [(name, row) for name, rows in kept.items() for row in rows]
    lines = [HEAD, *headline([row["figures"] for _, row in rows]), "", "## Each drill", ""]
    lines += ["| drill | passed | figures | commit |", "|---|---|---|---|"]
    lines += [
        f"| `{name}`: {row['drill']} | {verdict(row)} | {words(row)} | {row['commit'][:7]} |" for name, row in rows
    ]
    for _, row in rows:
        lines += [line for title, table in tables(row) for line in table_lines(row["drill"], title, table)]
    versions = ", ".join(f"{package} {version}" for package, version in package_versions().items())
    newest = max(row["date"] for _, row in rows)
    lines += ["", f"Last written on {newest} with {versions}."]
    return "\n".join(lines) + "\n"


def headline(figures: list[dict[str, Any]]) -> list[str]:
    """The figures that are added up over all drills, or of which the worst counts."""

    def all_of(name: str) -> list[Any]:
        return [each[name] for each in figures if name in each]

    def total(name: str) -> int:
        return sum(all_of(name))

    def worst(name: str) -> float | int | str:
        return max(all_of(name), default="not measured")

    orders = {value for table in all_of("order hash") for value in table.values()}
    combinations = sum(len(table) for table in all_of("order hash"))
    facts = {
        "kills run / recovered": f"{total('kills')} / {total('recovered')}",
        "checkpoints lost": total("checkpoints lost"),
        "corruptions injected / detected": f"{total('corruptions injected')} / {total('corruptions detected')}",
        "samples lost / repeated": f"{total('samples lost')} / {total('samples repeated')}",
        "different orders of samples": f"{len(orders)}, in {combinations} combinations of processes and workers",
        "samples and final weights bitwise equal": f"{total('runs equal')} of {total('runs compared')} runs",
        "most steps redone": f"{worst('most steps redone')}, of {worst('save interval in steps')} between saves",
        "seconds from resume to first step": worst("seconds from resume to first step (median)"),
        "seconds of training that a checkpoint of ViT-B costs": worst("save stall in seconds (median)"),
        "share of the training time, at the rate assumed below": worst(SHARE),
        "hangs": total("hangs"),
    }
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]


def verdict(row: Row) -> str:
    """In one word."""
    if row["skipped"]:
        return "skipped"
    return "yes" if row["passed"] else "**no**"


def words(row: Row) -> str:
    """The figures that are not tables, or why there are none."""
    simple = [(name, value) for name, value in row["figures"].items() if not isinstance(value, dict)]
    return row["skipped"] or "; ".join(f"{name}: {value}" for name, value in simple)


def tables(row: Row) -> list[tuple[str, dict[str, Any]]]:
    """The figures that are."""
    return [(name, value) for name, value in row["figures"].items() if isinstance(value, dict)]


def table_lines(drill: str, title: str, table: dict[str, Any]) -> list[str]:
    """One of them."""
    head = ["", f"### {drill[0].upper()}{drill[1:]}", "", f"| | {title} |", "|---|---|"]
    return head + [f"| {name} | {value} |" for name, value in table.items()]
