"""Which reading of the paper becomes the default: a rule that was written down before the runs it judges."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from .intervals import Interval, paired_difference
from .plan import ARMS, CANDIDATES, FEW, FROZEN, Run, Scale
from .records import Records
from .results import Metrics, metrics_by_seed

BASELINE = "mae"
DECIDING = {FEW: "fine-tuned, 1 %", "linear_cls": "linear, class token"}
BUDGETS = 2  # at so many a reading must be ahead
SEEDS = 5
RULE = f"""A candidate passes at a budget if its difference to MAE, paired over {SEEDS} seeds, is resolved above 0 on
one of {" and ".join(f"*{words}*" for words in DECIDING.values())}, which the paper reports, and not resolved below
0 on the other. One that passes at {BUDGETS} budgets is eligible. Of the eligible, the best has the largest sum of both
differences, averaged over the budgets that all candidates have; a simpler one, earlier in the table, takes its place
if the difference of their sums, paired by seed, is not resolved. It becomes the default; without an eligible one,
nothing changes. k-NN and the probe of the mean are reported and do not decide: the paper has neither. The learning
rate is MAE's in all; half of it, for MAE and all candidates, shows whether the order hangs on it."""


@dataclass(frozen=True)
class Decision:
    """What the rule gives so far.

    Args:
        passed: of each candidate, the budgets in steps at which it passes.
        judged: the budgets at which all candidates and MAE have all seeds.
        chosen: the arm that becomes the default; None: none is eligible, or too few budgets are judged.
    """

    passed: Mapping[str, list[int]]
    judged: list[int]
    chosen: str | None


def decide(scale: Scale, records: Records) -> Decision:
    """Applies the rule to what is recorded."""
    figures = {
        (name, steps): metrics_by_seed(
            [Run(scale, ARMS[name], steps, seed) for seed in range(SEEDS)], records, (FROZEN, FEW)
        )
        for name in (BASELINE, *CANDIDATES)
        for steps in scale.steps
    }
    judged = [
        steps
        for steps in scale.steps
        if all(
            len(figures[name, steps].get(metric, {})) == SEEDS
            for name in (BASELINE, *CANDIDATES)
            for metric in DECIDING
        )
    ]
    passed = {
        name: [steps for steps in judged if _passes(figures[name, steps], figures[BASELINE, steps])]
        for name in CANDIDATES
    }
    scores = {
        name: _scores([figures[name, steps] for steps in judged])
        for name in CANDIDATES
        if len(passed[name]) >= BUDGETS
    }
    return Decision(passed, judged, _choose(scores))


def _passes(ours: Metrics, baseline: Metrics) -> bool:
    differences = [paired_difference(ours[metric], baseline[metric]) for metric in DECIDING]
    signs = [_sign(difference) for difference in differences if difference]
    return max(signs) > 0 and min(signs) >= 0


def _sign(difference: Interval) -> int:
    """+1 or -1 where it is resolved."""
    return 0 if 0 in difference else (1 if difference.mean > 0 else -1)


def _scores(figures: list[Metrics]) -> dict[int, float]:
    """By seed: the sum of what decides, averaged over budgets. MAE's is the same for all, and left out."""
    return {seed: fmean(sum(found[metric][seed] for metric in DECIDING) for found in figures) for seed in range(SEEDS)}


def _choose(scores: Mapping[str, dict[int, float]]) -> str | None:
    """The best, or the simplest that is not resolved from it; `scores` has the simplest first."""
    if not scores:
        return None
    best = max(scores, key=lambda name: fmean(scores[name].values()))
    for name, own in scores.items():
        difference = paired_difference(scores[best], own)
        if name == best or (difference and 0 in difference):
            return name
    return best
