"""What is known of a group: metrics by arm, budget and seed, and their differences."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from .intervals import Interval, paired_difference
from .plan import ARMS, PRETRAIN, STAGES, Comparison, Group, Run, Scale, runs_of
from .records import Records

Metrics = dict[str, dict[int, float]]  # metric -> seed -> value


def metrics_by_seed(runs: Iterable[Run], records: Records, stages: Sequence[str] = STAGES) -> Metrics:
    """What the records have of some stages of runs that differ in nothing but their seed."""
    found: Metrics = {}
    for run in runs:
        lines = filter(None, (records.find(run, stage) for stage in stages))
        for metric, value in (item for line in lines for item in line["metrics"].items()):
            if value is not None:
                found.setdefault(metric, {})[run.seed] = value
    return found


class Results:
    """The figures of one group at one scale, as far as there are any.

    `metrics`: (arm, steps) → metric → seed → value; budgets in ascending order, arms in the plan's.
    """

    def __init__(self, scale: Scale, group: Group, records: Records):
        self.scale, self.group, self._records = scale, group, records
        self.metrics: dict[tuple[str, int], Metrics] = {}
        order = list(ARMS)
        by_arm = sorted(runs_of(group, scale), key=lambda run: (run.steps, order.index(run.arm.name), run.seed))
        for (name, steps), members in groupby(by_arm, key=lambda run: (run.arm.name, run.steps)):
            runs = list(members)
            if found := metrics_by_seed(runs, records, group.stages):
                self.metrics[name, steps] = metrics_by_seed(runs, records, (PRETRAIN,)) | found

    @property
    def budgets(self) -> list[int]:
        """In steps, of trained arms with figures."""
        return sorted({steps for name, steps in self.metrics if ARMS[name].is_trained})

    def differences(self, steps: int) -> Iterator[tuple[Comparison, dict[str, Interval]]]:
        """Of each comparison at a budget: by metric, the paired difference. Those without any are left out."""
        for each in self.group.comparisons:
            ours, baseline = (self.metrics.get((name, steps), {}) for name in (each.arm, each.baseline))
            found = {
                metric: difference
                for metric in ours
                if (difference := paired_difference(ours[metric], baseline.get(metric, {})))
            }
            if found:
                yield each, found

    def series(self, steps: int, seed: int = 0) -> dict[str, dict[str, list[float]]]:
        """The course of one seed's training at a budget, by arm."""
        found = {}
        for name, length in self.metrics:
            line = self._records.find(Run(self.scale, ARMS[name], length, seed), PRETRAIN)
            if length == steps and line:
                found[name] = line["series"]
        return found
