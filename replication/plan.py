"""What the study compares, and in which order the work is done.

A run is a pre-training of one arm, of one length, with one seed; stages measure what came of it. All arms of a scale
have the same masked views a step, the same steps, learning rate and warm-up, as in the paper (Sec. 5.1): with N masks
a step has 1/N of the images of a step with one.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any

from mimae.flags.recipes import read_recipe
from mimae.masking import complete_num_masks

HERE = Path(__file__).parent
PRETRAIN, FROZEN, FEW, ALL, CORRUPTED = "pretrain", "frozen", "finetune_1percent", "finetune", "corruptions"
STAGES = (PRETRAIN, FROZEN, FEW, ALL, CORRUPTED)
SHORTEST, MIDDLE, LONGEST = range(3)  # of a scale's budgets
WARM_UP = 0.1  # of the steps
REC_ONLY = {"mi_max_weight": 0, "mi_min_weight": 0}
FEW_SEEDS = 2  # fine-tunings of a model on 1 % of the images; their mean counts
recipe_at = cache(read_recipe)  # hundreds of runs share a handful; not to be changed


@dataclass(frozen=True)
class Scale:
    """A size of model, and how long it is trained.

    Args:
        recipe: of pre-training; `swin` is the same for MI-SimMIM's arms.
        few, every: recipes of fine-tuning on 1 % of the images, and on all.
        views_per_step: masked views of an optimiser step, over all images.
        steps: the budgets, the shortest first.
    """

    name: str
    recipe: Path
    swin: Path
    few: Path
    every: Path
    views_per_step: int
    steps: tuple[int, int, int]

    def finetuning(self, stage: str) -> Path:
        """The recipe of a stage that fine-tunes, or tests what was fine-tuned."""
        return self.few if stage == FEW else self.every


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "small",
            HERE / "small.yaml",
            HERE / "small_swin.yaml",
            HERE / "small_finetune_1percent.yaml",
            HERE / "small_finetune.yaml",
            views_per_step=256,
            steps=(800, 1600, 3200),
        ),
        Scale(
            "vit-tiny",
            HERE / "vit_tiny.yaml",
            HERE / "small_swin.yaml",
            HERE / "vit_tiny_finetune_1percent.yaml",
            HERE / "vit_tiny_finetune.yaml",
            views_per_step=1024,
            steps=(1200, 2400, 4800),
        ),
    )
}


@dataclass(frozen=True)
class Arm:
    """One way to pre-train.

    Args:
        words: what a table calls it.
        fields: of the configuration, on top of the scale's recipe.
        parts: forward passes of a step; negatives do not reach from one to another.
        has_ramp: whether the weights of the information terms grow over the warm-up.
        rate: of learning, as a multiple of the recipe's.
        is_swin: whether it is of MI-SimMIM's recipe.
        is_trained: False: one step at a rate of nothing, which leaves random weights.
    """

    name: str
    words: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    parts: int = 1
    has_ramp: bool = False
    rate: float = 1.0
    is_swin: bool = False
    is_trained: bool = True

    @property
    def has_information_terms(self) -> bool:
        """Whether anything is weighted that the gate could open for."""
        return self.is_trained and any(self.fields.get(name, 1) > 0 for name in REC_ONLY)

    def num_views(self, recipe: Mapping[str, Any]) -> int:
        """N."""
        settings = {"num_masks": 2 if self.is_swin else 4, "mask_ratio": 0.75, **recipe, **self.fields}
        return settings["num_masks"] or complete_num_masks(settings["mask_ratio"])


def _ratio(ratio: float, num_masks: int | None) -> Arm:
    words = "complete masking" if num_masks is None else f"{num_masks} masks"
    return Arm(f"ratio-{ratio:g}-{num_masks or 'complete'}", f"r = {ratio:g}, {words}", _masks(num_masks, ratio))


def _masks(num_masks: int | None, ratio: float = 0.75) -> dict[str, Any]:
    return {"num_masks": num_masks, "mask_ratio": ratio}


def _weights(mi_max: float, mi_min: float) -> Arm:
    fields = {"mi_max_weight": mi_max, "mi_min_weight": mi_min}
    return Arm(f"weights-{mi_max:g}-{mi_min:g}", f"λ₂ = {mi_max:g}, λ₃ = {mi_min:g}", fields)


# what the paper leaves open: which terms, what a view's vector ẑ is, when the terms begin
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "rec-max": ("L_rec + L_max", {"mi_min_weight": 0}),
    "mi-mae": ("all terms", {}),
}
LATENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("mean of the patches", {}),
    "cls": ("class token", {"latent_pooling": "cls"}),
    "all": ("mean of all tokens", {"latent_pooling": "all"}),
}
# an early threshold: L_rec of the recorded runs fell below it within a twentieth of the steps, at every budget
GATES: dict[str, tuple[str, dict[str, Any]]] = {
    "late": ("gate at the recipe's threshold", {}),
    "open": ("no gate", {"mi_gate_threshold": None}),
    "ramp": ("no gate, a ramp over the warm-up", {"mi_gate_threshold": None}),
    "early": ("gate at 0.85", {"mi_gate_threshold": 0.85}),
}
Reading = tuple[str, str, str]  # a loss, a latent, a gate
# these have been run under a name of their own
NAMED: dict[Reading, str] = {
    ("rec-max", "mean", "late"): "rec-max",
    ("mi-mae", "mean", "late"): "mi-mae",
    ("mi-mae", "mean", "open"): "gate-none",
    ("mi-mae", "cls", "late"): "latent-cls",
    ("mi-mae", "all", "late"): "latent-all",
}


def _reading(loss: str, latent: str, gate: str) -> Arm:
    parts = (LOSSES[loss], LATENTS[latent], GATES[gate])
    words = "{}; ẑ: {}; {}".format(*(words for words, _ in parts))
    fields = {name: value for _, each in parts for name, value in each.items()}
    return Arm(f"{loss}-{latent}-{gate}", words, fields, has_ramp=gate == "ramp")


def _at_half_the_rate(arm: Arm) -> Arm:
    return replace(arm, name=f"{arm.name}-half-rate", words=f"{arm.words}, half the rate", rate=0.5)


_READINGS = {each: _reading(*each) for each in product(LOSSES, LATENTS, GATES)}
READINGS = {each: NAMED.get(each, arm.name) for each, arm in _READINGS.items()}  # names of arms
# what the rule compares, the simplest first: a trial of two seeds found every arm without a gate ahead of MAE
CANDIDATES = [READINGS[loss, latent, "open"] for loss, latent in product(LOSSES, ("mean", "cls"))]
_MAE = Arm("mae", "MAE: one mask, L_rec (a)", {"num_masks": 1, **REC_ONLY})
_GATE_NONE = Arm("gate-none", "no gate", {"mi_gate_threshold": None})

ARMS = {
    arm.name: arm
    for arm in (
        Arm("untrained", "random weights", is_trained=False),
        _MAE,
        Arm("four-masks", "control: four orthogonal masks, L_rec", REC_ONLY),
        Arm("mi-mae", "MI-MAE (f)"),
        Arm("rec-max", "L_rec + L_max (b)", {"mi_min_weight": 0}),
        Arm(
            "max-alone",
            "L_max alone (c)",
            {"reconstruction_weight": 0, "mi_min_weight": 0, "mi_gate_threshold": None},
        ),
        Arm("untrained-v", "all terms, V untrained (d)", {"train_approximator": False}),
        Arm("rec-min", "L_rec + L_min (e)", {"mi_max_weight": 0}),
        *(_weights(*each) for each in ((1, 1), (1, 20), (0.1, 10), (0.5, 10), (10, 10))),
        Arm("independent", "independent masks", {"mask_strategy": "independent"}),
        *(_ratio(*each) for each in product((0.5, 0.9), (None, 4))),
        Arm("six-masks", "6 masks", _masks(6)),
        Arm("eight-masks", "8 masks", _masks(8)),
        Arm("gate-step", "gate that may close again", {"mi_gate_mode": "step"}),
        _GATE_NONE,
        Arm("latent-cls", "ẑ: class token", {"latent_pooling": "cls"}),
        Arm("latent-all", "ẑ: mean of class and patch tokens", {"latent_pooling": "all"}),
        Arm("v-token", "V on each token", {"approximator_unit": "token"}),
        Arm("negatives-quarter", "negatives of a quarter of the step", parts=4),
        *(arm for each, arm in _READINGS.items() if each not in NAMED),
        *map(_at_half_the_rate, (_MAE, _GATE_NONE, *(arm for arm in _READINGS.values() if arm.name in CANDIDATES))),
        Arm("simmim", "SimMIM: one mask, L_rec", {"num_masks": 1, **REC_ONLY}, is_swin=True),
        Arm("mi-simmim", "MI-SimMIM", is_swin=True),
    )
}


@dataclass(frozen=True)
class Run:
    """One pre-training."""

    scale: Scale
    arm: Arm
    steps: int
    seed: int

    def __str__(self) -> str:
        return f"{self.arm.name}-{self.steps}-{self.seed}"

    @property
    def recipe(self) -> Path:
        """That its flags are on top of."""
        return self.scale.swin if self.arm.is_swin else self.scale.recipe

    @cached_property
    def flags(self) -> dict[str, Any]:
        """Of the pre-training script."""
        num_views = self.arm.num_views(recipe_at(self.recipe))
        images = max(1, round(self.scale.views_per_step / num_views / self.arm.parts))
        flags = {
            **self.arm.fields,
            "seed": self.seed,
            "max_train_steps": self.steps,
            "warmup_steps": round(WARM_UP * self.steps),
            "per_device_train_batch_size": images,
            "gradient_accumulation_steps": self.arm.parts,
        }
        if self.arm.has_ramp:
            flags["mi_ramp_steps"] = flags["warmup_steps"]
        if not self.arm.is_trained:
            return {**flags, "base_learning_rate": 1e-12}
        if self.arm.rate != 1:
            flags["base_learning_rate"] = self.arm.rate * recipe_at(self.recipe)["base_learning_rate"]
        return flags

    @property
    def is_shown(self) -> bool:
        """Whether it stands for its arm where a picture of one run is wanted: at the budget that all arms have."""
        return self.seed == 0 and self.steps in (1, self.scale.steps[MIDDLE])

    @property
    def views(self) -> int:
        """Masked views in all."""
        return self.steps * self.scale.views_per_step

    def settings(self, stage: str) -> str:
        """A digest of all that a stage's result follows from; a result of other settings counts for nothing."""
        parts = [recipe_at(self.recipe), self.flags]
        if stage not in (PRETRAIN, FROZEN):
            parts.append(recipe_at(self.scale.finetuning(stage)))
        if stage == FEW:
            parts.append({"seeds": FEW_SEEDS})
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Comparison:
    """A row of differences.

    Args:
        arm, baseline: names.
        claim: what the paper says of the difference: +1 better, -1 worse, 0 nothing.
        paper: its difference in points, by metric.
    """

    arm: str
    baseline: str
    claim: int = 0
    paper: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Rows that are told together, and the work that they need.

    Args:
        comparisons: their arms, and those of `further`, are run.
        seeds: how many.
        budgets: places in the scale's `steps`.
        stages: after the pre-training; what the group tells of.
        remark: what the page says of it.
    """

    title: str
    comparisons: Sequence[Comparison]
    seeds: int
    budgets: tuple[int, ...]
    stages: tuple[str, ...] = (FROZEN,)
    further: tuple[str, ...] = ()
    remark: str = ""

    @property
    def arms(self) -> list[str]:
        """Baselines first."""
        named = [name for each in self.comparisons for name in (each.baseline, each.arm)]
        return list(dict.fromkeys([*self.further, *named]))


def _headline(paper: Mapping[str, float]) -> tuple[Comparison, ...]:
    """Of Table 1, with the control that it lacks."""
    return (
        Comparison("mi-mae", "mae", +1, paper),
        Comparison("four-masks", "mae"),
        Comparison("mi-mae", "four-masks"),
    )


# differences of the paper's figures: Tables 1, 3 and 5, and Sec. 5.3
GROUPS = (
    Group(
        "Table 1, and the control that it lacks",
        _headline({"linear_cls": 1.3}),
        seeds=5,
        budgets=(SHORTEST, MIDDLE, LONGEST),
        further=("untrained",),
        remark="Four orthogonal masks and L_rec alone are the control that reviewer 4 of the paper asked for in "
        "public ([OpenReview](https://openreview.net/forum?id=NoiaAT0eec)).",
    ),
    Group(
        "Where MI-MAE pays: the readings that the rule compares",
        (
            *(Comparison(arm, "mae", +1, {"linear_cls": 1.3, FEW: 1.2}) for arm in CANDIDATES),
            *(Comparison(arm, "four-masks") for arm in CANDIDATES),
            Comparison("four-masks", "mae"),
        ),
        seeds=5,
        budgets=(SHORTEST, MIDDLE, LONGEST),
        stages=(FROZEN, FEW),
        further=("untrained",),
    ),
    Group(
        "Where MI-MAE pays: the other readings",
        tuple(Comparison(arm, "mae", +1) for arm in READINGS.values() if arm not in CANDIDATES),
        seeds=3,
        budgets=(SHORTEST, MIDDLE, LONGEST),
        stages=(FROZEN, FEW),
    ),
    Group(
        "Where MI-MAE pays: another learning rate",
        tuple(Comparison(f"{arm}-half-rate", "mae-half-rate", +1) for arm in CANDIDATES),
        seeds=3,
        budgets=(MIDDLE,),
        stages=(FROZEN, FEW),
    ),
    Group(
        "Table 3a: the terms of the loss",
        (
            Comparison("rec-max", "mae", +1, {ALL: 0.3}),
            Comparison("max-alone", "mae", -1),
            Comparison("untrained-v", "mae", +1, {ALL: 0.2}),
            Comparison("rec-min", "mae", +1, {ALL: 0.2}),
            Comparison("mi-mae", "mae", +1, {ALL: 0.6}),
            Comparison("mi-mae", "rec-max", +1, {ALL: 0.3}),
            Comparison("mi-mae", "untrained-v", +1, {ALL: 0.4}),
            Comparison("mi-mae", "rec-min", +1, {ALL: 0.4}),
            Comparison("max-alone", "rec-max"),
            *(Comparison(arm, "four-masks") for arm in ("rec-max", "max-alone", "rec-min", "mi-mae")),
        ),
        seeds=3,
        budgets=(MIDDLE,),
    ),
    Group(
        "Table 3b: the weights",
        (
            Comparison("weights-1-1", "mi-mae", -1, {ALL: -0.2}),
            Comparison("weights-1-20", "mi-mae", -1, {ALL: -0.1}),
            Comparison("weights-0.1-10", "mi-mae", -1, {ALL: -0.3}),
            Comparison("weights-0.5-10", "mi-mae", -1, {ALL: -0.1}),
            Comparison("weights-10-10", "mi-mae", -1, {ALL: -0.2}),
        ),
        seeds=3,
        budgets=(MIDDLE,),
    ),
    Group(
        "Table 3c and Fig. 2: the masks",
        (
            Comparison("independent", "mi-mae", -1, {ALL: -0.2}),
            Comparison("six-masks", "mi-mae", +1, {ALL: 0.1}),
            Comparison("eight-masks", "mi-mae", -1, {ALL: -0.1}),
            *(Comparison(f"ratio-{ratio}-{masks}", "mi-mae") for ratio in (0.5, 0.9) for masks in ("complete", 4)),
        ),
        seeds=3,
        budgets=(MIDDLE,),
    ),
    Group(
        "Open choices: the gate",
        (
            *(Comparison(arm, "mi-mae") for arm in ("gate-step", "gate-none")),
            *(Comparison("gate-none", baseline) for baseline in ("four-masks", "mae")),
        ),
        seeds=3,
        budgets=(MIDDLE,),
    ),
    Group(
        "Open choices: the latent, V and the negatives",
        tuple(Comparison(arm, "mi-mae") for arm in ("latent-cls", "latent-all", "v-token", "negatives-quarter")),
        seeds=3,
        budgets=(MIDDLE,),
    ),
    Group(
        "Table 1 by fine-tuning on 1 %",
        _headline({FEW: 1.2}),
        seeds=5,
        budgets=(LONGEST,),
        stages=(FEW,),
        further=("untrained",),
    ),
    Group(
        "Table 1 by fine-tuning on all images, and Table 5",
        (*_headline({ALL: 0.5}), *(Comparison(arm, "mae", +1, {ALL: 0.5}) for arm in CANDIDATES)),
        seeds=3,
        budgets=(LONGEST,),
        stages=(ALL, CORRUPTED),
        further=("untrained",),
    ),
    Group(
        "Table 1 on a Swin",
        (Comparison("mi-simmim", "simmim", +1),),
        seeds=3,
        budgets=(MIDDLE,),
    ),
)


def runs_of(group: Group, scale: Scale) -> list[Run]:
    """A budget before the next, and in it all arms with one seed before any with the next; random weights have one."""
    found = []
    for budget, seed, name in product(group.budgets, range(group.seeds), group.arms):
        arm = ARMS[name]
        if arm.is_trained:
            found.append(Run(scale, arm, scale.steps[budget], seed))
        elif budget == group.budgets[0]:
            found.append(Run(scale, arm, 1, seed))
    return found


def tasks(scale: Scale) -> Iterator[tuple[Group, Run, str]]:
    """Every stage of every run once, in the order of the work, under the group that asks for it first."""
    seen = set()
    for group in GROUPS:
        for run in runs_of(group, scale):
            for stage in (PRETRAIN, *group.stages):
                if (str(run), stage) not in seen:
                    seen.add((str(run), stage))
                    yield group, run, stage
