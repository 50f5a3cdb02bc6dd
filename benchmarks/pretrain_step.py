"""Masked views per second of a pre-training step: this project beside transformers, the official model and lightly.

All have the same views a step: an image of ours has N of them, an image of the others one. What is timed is the
forward pass alone, or forward, backward, the gradient's norm or clipping as each does it, and fused AdamW.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .measurement import Bar, Measurement, Table
from .measuring import matmul_rate, ratio, settle, take_turns, timed
from .models.contestants import FULL, OURS, PLAIN, PRECISIONS, SMALL, WITHOUT_TERMS, Setting, contestants
from .models.operations import table_of_operations
from .models.peers import PEERS, Official, check_peers, plain_config

STOCK, OFFICIAL = "transformers", "official"
SOME = (FULL, STOCK, OFFICIAL)
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = ("", "precision", "mode", "views/s, forward", "views/s, step", "x transformers eager", "% of matrix rate")
Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Plan:
    """What is measured on a kind of machine.

    Args:
        views: of a step, by preset. Of the first preset all contestants are timed, compiled ones too; of others some.
        rounds: of the first preset in the precisions that are `thorough`, and of the information terms; of all else.
        thorough: precisions; compiled contestants are timed in these alone.
        terms_images: images of four views where the cost of the information terms is measured.
        memory_views: views of two steps; what the larger takes more is memory per view. None: not measured.
        compiled: contestants that are timed compiled, too.
        fields: of the configuration, in place of the preset's.
    """

    views: dict[str, int]
    rounds: tuple[int, int]
    thorough: tuple[str, ...]
    terms_images: int
    memory_views: tuple[int, int] | None = None
    compiled: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def terms(self) -> str:
        """In words, where the cost of the information terms is measured."""
        return f"{self.terms_images} x 4 views"


PLANS = {
    "cpu": Plan(
        {"vit-base": 40, "vit-tiny": 40, "vit-small": 40, "vit-large": 8},
        rounds=(3, 1),
        thorough=("float32", "bf16"),
        terms_images=32,  # a step of 64 takes 24 GiB
        compiled=(FULL, STOCK),
    ),
    "cuda": Plan(
        {"vit-base": 640, "vit-tiny": 2560, "vit-small": 1280, "vit-large": 320},
        rounds=(50, 10),
        thorough=("bf16",),
        terms_images=64,
        memory_views=(160, 640),
        compiled=(PLAIN, FULL, STOCK, OFFICIAL),
    ),
}
QUICK = Plan(
    {"vit-tiny": 40},
    rounds=(1, 1),
    thorough=("bf16",),
    terms_images=2,
    fields=SMALL,
)


@dataclass(frozen=True)
class Times:
    """Seconds of each call, by contestant, of contestants that took turns.

    `compiling` are those of the first step of each, where it is compiled.
    """

    preset: str
    precision: str
    compiled: bool
    views: int
    forward: Seconds
    step: Seconds
    compiling: dict[str, float] = field(default_factory=dict)

    def views_per_second(self, name: str, seconds: Seconds) -> float:
        """Of a contestant; `seconds` is `forward` or `step`."""
        return self.views / statistics.median(seconds[name])


@dataclass(frozen=True)
class Speed:
    """The times of one preset, and the machine's rates of matrix products by precision."""

    preset: str
    times: list[Times]
    matmul_rates: dict[str, float]
    flops: int  # of a view

    def of(self, precision: str, *, compiled: bool = False) -> Times:
        """Those of a precision."""
        return next(times for times in self.times if (times.precision, times.compiled) == (precision, compiled))

    def step(self, name: str, precision: str = "bf16", *, compiled: bool = False) -> float:
        """Views per second of a whole step."""
        times = self.of(precision, compiled=compiled)
        return times.views_per_second(name, times.step)

    def share(self, views_per_second: float, precision: str) -> float:
        """Percent of the machine's rate; see `flops_per_view`."""
        return 100 * views_per_second * self.flops / self.matmul_rates[precision]


def measure(device: torch.device, *, quick: bool) -> Measurement:
    """Times, ratios, the cost of the information terms and of more masks, and memory."""
    plan = QUICK if quick else PLANS[device.type]
    first, *others = plan.views
    check_peers(plain_config(first, **plan.fields), list(PEERS), device, tolerance=1e-4)
    rates = {precision: matmul_rate(dtype, device) for precision, dtype in DTYPES.items()}
    found = []
    for precision in PRECISIONS:
        found.append(time_steps([*OURS, *PEERS], first, precision, plan, device))
        if plan.compiled and precision in plan.thorough:
            found.append(time_steps(plan.compiled, first, precision, plan, device, compiled=True))
        found += [time_steps(SOME, preset, precision, plan, device) for preset in others]
    terms = time_terms(first, plan, device)
    memory = memory_per_view(first, plan, device)
    speeds = {
        preset: Speed(
            preset,
            [times for times in found if times.preset == preset],
            rates,
            flops_per_view(preset, **plan.fields),
        )
        for preset in plan.views
    }
    tables = [
        *(table_of(speed) for speed in speeds.values()),
        *([table_of_memory(memory, first, plan.memory_views)] if plan.memory_views else []),
        *(
            table_of_operations((FULL, STOCK), Setting(first, plan.views[first], device, precision, plan.fields))
            for precision in PRECISIONS
        ),
    ]
    speed = speeds[first]
    return Measurement(
        f"Random images; all contestants make the same views a step. {rate_words(rates)}",
        tables,
        [*bars_of_cpu(speed, device), *bars_of_gpu(speed, memory, device), *bars_of_both(speed, terms, device)],
    )


def time_steps(
    names: Sequence[str], preset: str, precision: str, plan: Plan, device: torch.device, *, compiled: bool = False
) -> Times:
    """Forward passes, then whole steps; contestants take turns."""
    is_thorough = preset == next(iter(plan.views)) and precision in plan.thorough
    rounds = plan.rounds[0 if is_thorough else 1]
    warm_up = 1 if device.type == "cpu" else 5
    views = plan.views[preset]
    with contestants(names, Setting(preset, views, device, precision, plan.fields, compiled)) as found:
        compiling = {}
        if compiled:
            torch.compiler.config.force_disable_caches = True  # or it would be the time of a second run
            compiling = {name: timed(each.step, device, time.perf_counter) for name, each in found.items()}
        forward, step = (
            take_turns(
                {name: getattr(each, part) for name, each in found.items()},
                rounds=rounds,
                warm_up=warm_up,
                device=device,
            )
            for part in ("forward", "step")
        )
    return Times(preset, precision, compiled, views, forward, step, compiling)


def time_terms(preset: str, plan: Plan, device: torch.device) -> float:
    """How much longer the step with the information terms takes than that with four masks alone, as a fraction."""
    setting = Setting(preset, 4 * plan.terms_images, device, "bf16", plan.fields)
    with contestants((FULL, WITHOUT_TERMS), setting) as found:
        calls = {name: each.step for name, each in found.items()}
        seconds = take_turns(calls, rounds=plan.rounds[0], warm_up=1, device=device)
    return ratio(seconds, FULL, WITHOUT_TERMS) - 1


def memory_per_view(preset: str, plan: Plan, device: torch.device) -> dict[str, float]:
    """Bytes of a GPU that a view adds to the peak of a step in bf16, by contestant."""
    if plan.memory_views is None:
        return {}
    less, more = plan.memory_views
    settings = [Setting(preset, views, device, "bf16", plan.fields) for views in (less, more)]
    found = {}
    for name in (PLAIN, FULL, *PEERS):
        of_less, of_more = (peak_memory(name, setting) for setting in settings)
        found[name] = (of_more - of_less) / (more - less)
    return found


def peak_memory(name: str, setting: Setting) -> int:
    """Bytes of the GPU in a step that finds the optimiser's state made."""
    with contestants((name,), setting) as found:
        found[name].step()
        torch.cuda.reset_peak_memory_stats(setting.device)
        found[name].step()
        settle(setting.device)
        return torch.cuda.max_memory_allocated(setting.device)


def flops_per_view(preset: str, **fields: Any) -> int:
    """Floating-point operations of the forward and the backward pass of the official model, for one view.

    Whoever saves some of them has the same count, and so a larger share of the machine's rate.
    """
    config = plain_config(preset, **fields)
    with torch.device("meta"):
        model = Official(config)
        images, noise = torch.empty(1, 3, *config.image_size_2d), torch.empty(1, config.num_patches)
    with FlopCounterMode(display=False) as counter:
        model(images, noise).backward()
    return counter.get_total_flops()


def table_of(speed: Speed) -> Table:
    """All contestants of a preset."""
    rows = []
    for times in speed.times:
        for name in times.step:
            rate = times.views_per_second(name, times.step)
            rows.append(
                [
                    f"**mimae** {name}" if name in OURS else name,
                    times.precision,
                    "compiled" if times.compiled else "eager",
                    times.views_per_second(name, times.forward),
                    rate,
                    rate / speed.step(STOCK, times.precision),
                    speed.share(rate, times.precision),
                ]
            )
    gflop = speed.flops / 1e9
    note = f"{speed.times[0].views} views a step; {gflop:.3g} GFLOP a view, forward and backward. Medians."
    return Table(f"{speed.preset}, 224 px", COLUMNS, rows, note)


def table_of_memory(memory: dict[str, float], preset: str, views: tuple[int, int]) -> Table:
    """Bytes a view adds."""
    rows = [[f"**mimae** {name}" if name in OURS else name, value / 2**20] for name, value in memory.items()]
    note = f"Peak of a step of {views[1]} views less that of {views[0]}, by the difference in views; bf16, eager."
    return Table(f"Memory, {preset}", ("", "MiB a view"), rows, note)


def rate_words(rates: dict[str, float]) -> str:
    """The machine's matrix products."""
    words = (f"{rate / 1e12:.3g} TFLOP/s in {precision}" for precision, rate in rates.items())
    return f"The machine multiplies large matrices at {' and '.join(words)}."


def bars_of_cpu(speed: Speed, device: torch.device) -> list[Bar]:
    """Without figures where there is a GPU. Ours is run the faster way, eager or compiled; transformers' is eager."""
    here = device.type == "cpu"
    found = []
    for precision in PRECISIONS:
        faster, share, note = None, None, ""
        if here:
            ways = [times for times in speed.times if times.precision == precision]
            rate, ours = max(((each.views_per_second(FULL, each.step), each) for each in ways), key=lambda way: way[0])
            faster, share = rate / speed.step(STOCK, precision), speed.share(rate, precision)
            note = f"compiled, in {ours.compiling[FULL]:.0f} s" if ours.compiled else "eager"
        found += [
            Bar(f"CPU, {precision}: views/s of a step, of transformers'", 1.15, faster, note=note),
            Bar(f"CPU, {precision}: share of the matrix rate", 70, share, "%", note=note),
        ]
    return found


def bars_of_gpu(speed: Speed, memory: dict[str, float], device: torch.device) -> list[Bar]:
    """Without figures where there is none. Ours is compiled, which is how it is run there; memory is that of eager."""
    promised = (
        Bar("GPU, bf16: MI-MAE, N = 4", 1475, None, "images/s"),
        Bar("GPU, bf16: MAE", 6300, None, "images/s"),
        Bar("GPU, bf16: MI-MAE's views/s, of transformers' (eager)", 2, None),
        Bar("GPU, bf16: MI-MAE's views/s, of the official model's (eager)", 2, None),
        Bar("GPU, bf16: memory per view, of the leanest peer's", 1, None, at_most=True),
    )
    if device.type != "cuda":
        return list(promised)
    full = speed.step(FULL, compiled=True)
    measured = (
        full / 4,
        speed.step(PLAIN, compiled=True),
        full / speed.step(STOCK),
        full / speed.step(OFFICIAL),
        memory[FULL] / min(value for name, value in memory.items() if name in PEERS),
    )
    return [replace(bar, figure=figure) for bar, figure in zip(promised, measured, strict=True)]


def bars_of_both(speed: Speed, terms: float, device: torch.device) -> list[Bar]:
    """What is promised of either kind of machine, of the other one without figures."""
    times = speed.of("bf16")
    *_, most_masks = OURS
    rise = ratio(times.step, most_masks, PLAIN)
    found = []
    for kind, device_type in (("CPU", "cpu"), ("GPU", "cuda")):
        here = device.type == device_type
        added = 100 * terms if here else None
        found += [
            Bar(
                f"{kind}, bf16: what the information terms add to a step",
                3,
                added,
                "%",
                True,
                PLANS[device_type].terms,
            ),
            Bar(f"{kind}, bf16: time per view, {most_masks}", 1, rise if here else None, "x N = 1", at_most=True),
        ]
    return found
