"""The page of all drills, from the outcomes that were kept."""

import json
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from mimae.jobs.results import package_versions, source_commit

from .outcome import Outcome
from .saving import SHARE

DOCS = Path(__file__).resolve().parents[1] / "docs"
OUTCOMES, PAGE = DOCS / "reliability.json", DOCS / "reliability.md"
NOT_MEASURED = "not measured"
HEAD = """# Reliability

What `make drills` does to real runs of `run_mim_pretrain.py`, and the outcome. The program writes this page;
`python -m mimae.drills NAME` repeats one drill and replaces its row. A run is *equal* if the samples, crops and noise
of every step and the bits of the final weights are those of an undisturbed run. Unless a row says otherwise, runs are
on a CPU with one thread, in float32 and with the same number of processes, and train the model of
[`drills/apparatus/tiny.yaml`](../drills/apparatus/tiny.yaml) on scikit-learn's digits.
"""

Row = dict[str, Any]


class Report:
    """Keeps what came of drills in a file, and writes the page anew each time.

    Args:
        order: the names of all drills, as they stand on the page.
        jobs: how many drills share the machine.
    """

    def __init__(self, order: Sequence[str], jobs: int, *, outcomes: Path = OUTCOMES, page: Path = PAGE):
        self._order, self._outcomes, self._page = order, outcomes, page
        self._facts = {
            "date": date.today().isoformat(),
            "commit": source_commit() or "unknown",
            "versions": ", ".join(f"{package} {version}" for package, version in package_versions().items()),
            "drills at a time": jobs,
        }
        self.has_failed = False

    def keep(self, name: str, outcome: Outcome, seconds: float) -> None:
        """Puts what came of a drill in the place of what came of it before."""
        self.has_failed |= not (outcome.passed or outcome.skipped)
        kept = json.loads(self._outcomes.read_text()) if self._outcomes.exists() else {}
        kept[name] = {**vars(outcome), **self._facts, "seconds": round(seconds)}
        kept = {each: kept[each] for each in self._order if each in kept}
        self._outcomes.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        self._page.write_text(page_of(kept, len(self._order)), encoding="utf-8")


def page_of(rows: dict[str, Row], num_drills: int) -> str:
    """All of it, as Markdown."""
    lines = [HEAD, *headline(list(rows.values()), num_drills), "", "## Each drill", ""]
    lines += ["| drill | passed | figures |", "|---|---|---|"]
    lines += [f"| `{name}`: {cell(row['drill'])} | {verdict(row)} | {words(row)} |" for name, row in rows.items()]
    for row in rows.values():
        for title, table in tables(row):
            lines += ["", f"### {row['drill'][0].upper()}{row['drill'][1:]}", "", f"| | {title} |", "|---|---|"]
            lines += [f"| {cell(name)} | {cell(value)} |" for name, value in table.items()]
    return "\n".join([*lines, "", "## Where and when", "", *circumstances(rows)]) + "\n"


def headline(rows: list[Row], num_drills: int) -> list[str]:
    """The figures that are added up over all drills, or of which the worst counts."""
    verdicts = Counter(verdict(row) for row in rows)

    def all_of(name: str) -> list[Any]:
        return [row["figures"][name] for row in rows if name in row["figures"]]

    def total(*names: str) -> str:
        sums = [sum(all_of(name)) if all_of(name) else NOT_MEASURED for name in names]
        return " / ".join(map(str, sums))

    def worst(name: str) -> Any:
        return max(all_of(name), default=NOT_MEASURED)

    orders = {value for table in all_of("order hash") for value in table.values()}
    combinations = sum(len(table) for table in all_of("order hash"))
    facts = {
        "drills passed / failed / skipped, of": f"{verdicts['yes']} / {verdicts['**no**']} / {verdicts['skipped']},"
        f" of {num_drills}",
        "kills run / recovered": total("kills", "recovered"),
        "checkpoints lost": total("checkpoints lost"),
        "corruptions injected / detected": total("corruptions injected", "corruptions detected"),
        "samples lost / repeated": total("samples lost", "samples repeated"),
        "different orders of samples, in combinations of processes and workers": f"{len(orders)}, in {combinations}",
        "runs compared / bitwise equal in samples and final weights": total("runs compared", "runs equal"),
        "most steps redone": worst("most steps redone"),
        "steps between saves there": worst("steps between saves"),
        "seconds from resume to first step, imports included": worst("seconds from resume to first step (median)"),
        "seconds of training that a checkpoint of ViT-B costs": worst("save stall in seconds (median)"),
        "share of the training time, at the rate assumed below": worst(SHARE),
        "hangs": sum(all_of("hangs")),
    }
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]


def circumstances(rows: dict[str, Row]) -> list[str]:
    """Date, commit, versions and load of each drill, those of the same together."""
    together: dict[tuple[Any, ...], list[str]] = {}
    for name, row in rows.items():
        facts = (row["date"], row["commit"], row["versions"], row["drills at a time"])
        together.setdefault(facts, []).append(name)
    return [
        f"- {day}, commit {commit[:7]}{commit[40:]}, {versions}, at most {jobs} drills at a time: {', '.join(names)}."
        for (day, commit, versions, jobs), names in together.items()
    ]


def verdict(row: Row) -> str:
    """In one word."""
    if row["skipped"]:
        return "skipped"
    return "yes" if row["passed"] else "**no**"


def words(row: Row) -> str:
    """The figures that are not tables, or why there are none."""
    simple = [f"{name}: {cell(value)}" for name, value in row["figures"].items() if not isinstance(value, dict)]
    return cell(row["skipped"] or "; ".join(simple))


def tables(row: Row) -> list[tuple[str, dict[str, Any]]]:
    """The figures that are."""
    return [(name, value) for name, value in row["figures"].items() if isinstance(value, dict)]


def cell(value: Any) -> str:
    """As it may stand in a table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(str(value).split()).replace("|", "\\|")
