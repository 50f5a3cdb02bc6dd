"""Writes docs/flags.md, where every flag can be found by its name.

python -m mimae.tests.flags_page > docs/flags.md
"""

from collections.abc import Iterator

from mimae.families.registry import CONFIG_CLASSES
from mimae.flags.model_fields import model_fields
from mimae.flags.option import HEADINGS, Entry, entries
from mimae.flags.scripts import SCRIPTS

INTRODUCTION = """\
# Flags

Every flag is a key of recipes, too; flags win over the recipe that `--config` names, and the recipe wins over the
defaults below. Names are written with `_`, or but for the fields of models with `-`; a flag that is on or off is given
alone, or with true or false. `--help` of a script says the same of its own
flags, and what its recipe changes.

This page is written by `python -m mimae.tests.flags_page`.
"""


def page() -> str:
    """A table for each heading of --help."""
    rows: dict[Entry, list[str]] = {}
    for script, groups in SCRIPTS.items():
        for entry in (entry for group in groups for entry in entries(group).values()):
            rows.setdefault(entry, []).append(script.removeprefix("run_").removesuffix(".py"))
    rows |= {entry: list(SCRIPTS) for entry in model_fields(CONFIG_CLASSES).values()}
    headings = dict.fromkeys([*HEADINGS, *(entry.heading for entry in rows)])
    return "\n".join([INTRODUCTION, *(line for heading in headings for line in _table(heading, rows))])


def _table(heading: str, rows: dict[Entry, list[str]]) -> Iterator[str]:
    members = [entry for entry in rows if entry.heading == heading]
    names = list(dict.fromkeys(entry.name for entry in members))
    yield f"## {heading[0].upper()}{heading[1:]}\n"
    yield "| Flag | Default | Scripts | What it does |"
    yield "| --- | --- | --- | --- |"
    for entry in sorted(members, key=lambda entry: names.index(entry.name)):
        scripts = "all" if len(rows[entry]) == len(SCRIPTS) else ", ".join(rows[entry])
        yield f"| `--{entry.name}` | {entry.default} | {scripts} | {entry.help} |"
    yield ""


if __name__ == "__main__":
    print(page(), end="")
