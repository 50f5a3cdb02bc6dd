"""`docs/replication.md` and its plots, from the records of all scales."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from mimae.flags.recipes import read_recipe

from ..benchmarks.measurement import Table, markdown_table
from .costs import TEST_IMAGES, price
from .frozen import MASKED_IMAGES, PROBE_IMAGES
from .intervals import Interval, verdict
from .plan import (
    ALL,
    ARMS,
    CANDIDATES,
    CORRUPTED,
    FEW,
    FROZEN,
    GROUPS,
    PRETRAIN,
    SCALES,
    Comparison,
    Scale,
    tasks,
)
from .plots import save_budgets, save_differences, save_losses
from .records import Records
from .results import Results
from .rule import RULE, decide

METRICS = {
    "knn": "k-NN",
    "linear_mean": "linear, mean",
    "linear_cls": "linear, class token",
    FEW: "fine-tuned, 1 %",
    ALL: "fine-tuned",
    CORRUPTED: "corrupted",
}
DIAGNOSTICS = {
    "common_reconstruction_loss": "L_rec",
    "alignment": "alignment",
    "uniformity": "uniformity",
    "rank": "RankMe",
    "mi_max_loss": "L_max",
    "mi_min_loss": "L_min",
    "gate_opened_at": "gate open at step",
}
BUDGET_WORDS = ("shortest", "middle", "longest")
STAGE_WORDS = {
    FROZEN: "k-NN and linear, on mean and class token",
    FEW: "fine-tuned on 1 %, twice",
    ALL: "fine-tuned on all",
    CORRUPTED: "corrupted",
}
OF_INFORMATION_TERMS = ("mi_max_loss", "mi_min_loss", "gate_opened_at")
HEAD = f"""# Does it work? A small-scale replication

What `make replicate` has measured. The program writes this page from the records in [`replication/`](replication).
All arms of a scale see the same number of masked views in the same number of optimiser steps, with the same learning
rate, warm-up and weight decay: a step with one mask has four times as many images as one with four, as in the paper.
No seed was dropped.

- **Images**: Fashion-MNIST, 60,000 to train on, {TEST_IMAGES:,} to test on, at 32 px; 64 patches of 4 px.
- **k-NN** (k = 20, mean of the patches) and **linear** (logistic regression on the mean of the patches or on the
  class token) are fitted on the frozen features of {PROBE_IMAGES:,} training images. **Fine-tuned** means the whole
  model, on 1 % of the images (60 of each class) or on all. **Corrupted** is the mean accuracy of the latter under
  five corruptions at five severities. All are accuracies on the test images, in percent.
- **Figures** are mean ± standard deviation over n seeds. Differences, in points, are paired by seed; in brackets is
  the 95 % interval of Student's t, which is wide for three seeds. *Holds*: the interval lies on the paper's side of 0;
  *does not hold*: on the other side; *not resolved*: it contains 0. Where the paper claims nothing, the words are
  *higher* and *lower*. Of so many intervals, one in twenty misses by chance. The paper's ablations (Table 3) fine-tune
  the models; here they are probed.
- **Diagnostics**: L_rec, alignment and uniformity (Wang and Isola 2020) on {MASKED_IMAGES:,} test images, with the
  same masks for all arms of one kind; RankMe (Garrido et al. 2023) on the mean features of the test images; L_max and
  L_min as last logged in training.

```bash
make replicate                              # runs what is not done yet; can be stopped and started again at any time
python -m mimae.replication --list          # the plan, what is done, and the time that is left
python -m mimae.replication --again mi-mae  # one run with a new seed, beside its prediction interval
```
"""


def write_report(folder: Path, readme: Path | None = None) -> None:
    """Writes `replication.md` and its plots into a folder, from `replication/<scale>.jsonl` in it.

    Args:
        readme: a page that quotes the first group between two marks.
    """
    lines = [HEAD, *plan_section()]
    for scale in SCALES.values():
        records = Records(folder / "replication" / f"{scale.name}.jsonl")
        lines += section(scale, records, folder / "replication")
        results = Results(scale, GROUPS[0], records)
        if readme and results.budgets:
            quote(results, readme)
    (folder / "replication.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def plan_section() -> list[str]:
    """What was decided before it was run: groups in the order of the work, and the rule for the default."""
    rows = [
        [
            each.title,
            len(each.arms),
            each.seeds,
            ", ".join(BUDGET_WORDS[budget] for budget in each.budgets),
            ", ".join(STAGE_WORDS[stage] for stage in each.stages),
        ]
        for each in GROUPS
    ]
    candidates = [[name, ARMS[name].words] for name in CANDIDATES]
    columns = ("group, in the order of the work", "arms", "seeds", "budgets", "measures")
    return [
        "## The plan",
        "",
        "Written into this page before the runs; the history has both. The candidates have no gate: in a trial of two "
        "seeds such readings were ahead of MAE on the class token, and those with a late gate were not. The early "
        "threshold is 0.85: L_rec of all runs recorded by then fell below it within a twentieth of their steps. "
        "Images in colour follow as a scale of their own, which is planned here before it is run.",
        "",
        *markdown_table(Table("", columns, rows)),
        "",
        f"**The rule for the default.** {RULE}",
        "",
        *markdown_table(Table("", ("candidate, the simplest first", "in words"), candidates)),
        "",
    ]


def decision_words(scale: Scale, records: Records) -> list[str]:
    """What the rule gives at a scale, as far as there are budgets to judge."""
    decision = decide(scale, records)
    if not decision.judged:
        return []
    rows = [
        [ARMS[name].words, ", ".join(f"{steps * scale.views_per_step:,}" for steps in passed) or "none"]
        for name, passed in decision.passed.items()
    ]
    outcome = f"**{ARMS[decision.chosen].words}**" if decision.chosen else "none: nothing changes"
    return [
        "### What the rule gives",
        "",
        *markdown_table(Table("", ("candidate", "passes at views"), rows)),
        "",
        f"Of {len(decision.judged)} judged budgets. The default by the rule: {outcome}.",
        "",
    ]


def quote(results: Results, readme: Path) -> None:
    """Puts the longest budget's table, and what holds of it, between the scale's marks of a page."""
    views = f"{results.budgets[-1] * results.scale.views_per_step:,}"
    table = accuracies(results)
    rows = [row for row in table.rows if row[1] in ("0", views)]
    tables = [Table("", table.columns, rows), findings([results])]
    lines = [line for each in tables if each.rows for line in ["", *markdown_table(without_empty_columns(each))]]
    begin, end = (f"<!-- replication, {results.scale.name}: {word} -->" for word in ("begin", "end"))
    text = readme.read_text(encoding="utf-8")
    quoted = re.sub(f"(?<={begin}\n).*(?={end})", "\n".join([*lines, "", ""]), text, flags=re.DOTALL)
    readme.write_text(quoted, encoding="utf-8")


def section(scale: Scale, records: Records, pictures: Path) -> list[str]:
    """All of a scale: what holds, the groups with what is measured of them, and the price of the rest."""
    lines = [f"## Scale `{scale.name}`", "", description(scale, records), "", *decision_words(scale, records)]
    measured = groups_with_news(scale, records)
    found = findings(measured)
    if found.rows:
        lines += ["### What holds", "", *markdown_table(without_empty_columns(found)), ""]
    for results in measured:
        tables = [accuracies(results), differences(results)]
        if FROZEN in results.group.stages:
            tables.append(diagnostics(results))
        lines += [f"### {results.group.title}", ""]
        lines += [results.group.remark, ""] if results.group.remark else []
        for table in map(without_empty_columns, tables):
            lines += [*markdown_table(table), ""] if table.rows else []
        lines += [*draw(results, pictures), *reconstructions(results, records)]
    return [*lines, *left_over(scale, records)]


def groups_with_news(scale: Scale, records: Records) -> list[Results]:
    """Those with figures of trained arms that no group before them has told."""
    told: set[tuple[Any, ...]] = set()
    measured = []
    for group in GROUPS:
        results = Results(scale, group, records)
        own = {(metric, *key) for key, found in results.metrics.items() for metric in found}
        if own - told and results.budgets:
            measured.append(results)
        told |= own
    return measured


def findings(measured: Sequence[Results]) -> Table:
    """What the paper claims, and whether the longest budget of each group bears it out."""
    rows = []
    for results in measured:
        for steps in results.budgets[-1:]:
            for each, found in results.differences(steps):
                if each.claim:
                    words = [ARMS[name].words for name in (each.arm, each.baseline)]
                    claim = f"{words[0]}: {'better' if each.claim > 0 else 'worse'} than {words[1]}"
                    count = max(difference.n for difference in found.values())
                    verdicts = [verdict_words(found.get(metric), each.claim) for metric in METRICS]
                    rows.append([claim, f"{steps * results.scale.views_per_step:,}", count, *verdicts])
    return Table("", ("the paper finds", "views", "n", *METRICS.values()), rows)


def description(scale: Scale, records: Records) -> str:
    """The scale in words, and the compute that it has taken so far."""
    words = (
        f"[`{scale.recipe.name}`](../replication/{scale.recipe.name}): {scale.views_per_step} masked "
        f"views a step, {', '.join(f'{steps:,}' for steps in scale.steps)} steps, a tenth of them warm-up."
    )
    if not records.lines:
        return f"{words} Nothing is done yet."
    hours = sum(line["seconds"] for line in records.lines) / 3600
    devices, commits = (sorted({line[key] for line in records.lines}) for key in ("device", "commit"))
    versions = ", ".join(
        f"{name} {' and '.join(sorted({line['versions'][name] for line in records.lines}))}"
        for name in records.lines[-1]["versions"]
    )
    return (
        f"{words} So far {len(records.lines)} stages have taken {hours:.1f} hours of one process each "
        f"({'; '.join(devices)}; commits {', '.join(commit[:7] for commit in commits)}; {versions})."
    )


def accuracies(results: Results) -> Table:
    """Mean and standard deviation of each arm at each budget."""
    rows = []
    for (name, steps), found in results.metrics.items():
        views = steps * results.scale.views_per_step if ARMS[name].is_trained else 0
        count = max(len(values) for values in found.values())
        rows.append([ARMS[name].words, f"{views:,}", count, *(spread(found.get(metric)) for metric in METRICS)])
    return Table("", ("arm", "views", "n", *METRICS.values()), rows)


def differences(results: Results) -> Table:
    """Of each comparison at each budget, with what the paper has."""
    rows = []
    for steps in results.budgets:
        for each, found in results.differences(steps):
            cells = [difference_words(found.get(metric), each.claim) for metric in METRICS]
            views = f"{steps * results.scale.views_per_step:,}"
            rows.append([comparison_words(each), views, *cells, paper_words(each)])
    return Table("", ("difference", "views", *METRICS.values(), "paper"), rows)


def diagnostics(results: Results) -> Table:
    """Means of each arm at the longest budget."""
    longest = results.budgets[-1]
    rows = []
    for (name, steps), found in results.metrics.items():
        if steps == longest or not ARMS[name].is_trained:
            shown = {metric: fmean(found[metric].values()) for metric in DIAGNOSTICS if metric in found}
            if not ARMS[name].has_information_terms:
                shown = {metric: value for metric, value in shown.items() if metric not in OF_INFORMATION_TERMS}
            rows.append([ARMS[name].words, *(shown.get(metric) for metric in DIAGNOSTICS)])
    return Table("", ("diagnostics", *DIAGNOSTICS.values()), rows)


def draw(results: Results, folder: Path) -> list[str]:
    """Draws curves over budgets and losses, or bars where there is one budget; returns the lines that show them."""
    slug = re.sub(r"[^a-z0-9]+", "-", results.group.title.lower()).strip("-")
    stem = f"{results.scale.name}-{slug}"
    if len(results.group.budgets) == 1:
        named = [(comparison_words(each), found) for each, found in results.differences(results.budgets[0])]
        if not named:
            return []
        save_differences(folder / f"{stem}.png", named, METRICS)
        return [f"![Differences with their intervals](replication/{stem}.png)", ""]
    save_budgets(folder / f"{stem}.png", results, METRICS)
    threshold = read_recipe(results.scale.recipe).get("mi_gate_threshold", 0.5)
    save_losses(folder / f"{stem}-losses.png", results.series(results.budgets[-1]), threshold)
    return [
        f"![Accuracy over masked views](replication/{stem}.png)",
        "",
        f"![Terms of the loss over the steps of one seed](replication/{stem}-losses.png)",
        "",
    ]


def reconstructions(results: Results, records: Records) -> list[str]:
    """Pictures of the arms that are first run for this group."""
    lines = []
    for group, run, stage in tasks(results.scale):
        picture = records.picture(run)
        if group is results.group and stage == PRETRAIN and run.is_shown and picture.exists():
            lines += [f"Reconstructions, {run.arm.words}:", "", f"![{run.arm.name}](replication/{picture.name})", ""]
    return lines


def left_over(scale: Scale, records: Records) -> list[str]:
    """What is not done, with its price."""
    rows = [
        [group.title, left, f"{flop:.2g}", "-" if hours is None else f"{hours:.1f}"]
        for group, _, left, flop, hours in price(scale, records)
        if left
    ]
    if not rows:
        return []
    columns = ("not done", "stages", "FLOP", "hours of one process, at the rates so far")
    return ["### What is left", "", *markdown_table(Table("", columns, rows)), ""]


def without_empty_columns(table: Table) -> Table:
    """Columns in which no row has anything are left out."""
    kept = [i for i in range(len(table.columns)) if any(row[i] not in (None, "") for row in table.rows)]
    return Table(table.title, [table.columns[i] for i in kept], [[row[i] for i in kept] for row in table.rows])


def spread(values: Mapping[int, float] | None) -> str | None:
    """Mean and standard deviation."""
    if not values:
        return None
    deviation = f" ± {stdev(values.values()):.2f}" if len(values) > 1 else ""
    return f"{fmean(values.values()):.2f}{deviation}"


def difference_words(difference: Interval | None, claim: int) -> str | None:
    """A difference, its interval and the verdict."""
    if difference is None:
        return None
    interval = f" [{difference.low:+.2f}, {difference.high:+.2f}]" if difference.n > 1 else ""
    return f"{difference.mean:+.2f}{interval} {verdict_words(difference, claim)}"


def verdict_words(difference: Interval | None, claim: int) -> str | None:
    """The verdict alone."""
    if difference is None:
        return None
    return verdict(difference, claim) if difference.n > 1 else "one seed"


def comparison_words(comparison: Comparison) -> str:
    """Both arms by their short names."""
    return f"{comparison.arm} - {comparison.baseline}"


def paper_words(comparison: Comparison) -> str:
    """The paper's differences."""
    if comparison.paper:
        return ", ".join(f"{METRICS[metric]} {value:+.1f}" for metric, value in comparison.paper.items())
    return {1: "better", -1: "worse", 0: ""}[comparison.claim]
