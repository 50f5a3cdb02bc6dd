"""Where the time of a step goes, by kind of operation."""

from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from ..measurement import Table
from .contestants import OURS, Setting, contestants

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "conv"),
    "fused attention": ("_scaled_dot_product", "_flash_attention", "_efficient_attention"),
    "softmax": ("softmax",),
    "GELU": ("gelu",),
    "LayerNorm": ("layer_norm",),
    "copies and casts": ("aten::copy_",),
    "gathers": ("gather", "scatter", "aten::index", "aten::cat"),
    "AdamW": ("adamw",),
}
OTHERS = "everything else"


def table_of_operations(names: tuple[str, ...], setting: Setting) -> Table:
    """Milliseconds of one eager step of each contestant, on the device, after one that is not looked at."""
    device = setting.device
    with contestants(names, setting) as found:
        columns = []
        for contestant in found.values():
            contestant.step()
            with profile(activities=activities(device)) as profiler:
                contestant.step()
            columns.append(milliseconds_by_kind(profiler, device))
    rows = [[kind, *(column[kind] for column in columns)] for kind in (*KINDS, OTHERS)]
    rows.append(["all", *(column.total() for column in columns)])
    heads = [f"**mimae** {name}, ms" if name in OURS else f"{name}, ms" for name in names]
    title = f"Where a step goes: {setting.preset}, {setting.precision}, {setting.views} views, eager"
    return Table(title, ("", *heads), rows)


def activities(device: torch.device) -> list[ProfilerActivity]:
    """What the profiler is to record."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def milliseconds_by_kind(profiler: profile, device: torch.device) -> Counter[str]:
    """Time of operations themselves, without what they call, on the device."""
    found: Counter[str] = Counter()
    for event in profiler.key_averages():
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        is_kernel = device.type == "cuda" and not event.key.startswith("aten::")  # counted with its operator
        if not is_kernel:
            found[kind_of(event.key)] += spent / 1000
    return found


def kind_of(operation: str) -> str:
    """Of an operator's name."""
    name = operation.lower()
    for kind, parts in KINDS.items():
        if any(name == part if part.startswith("aten::") else part in name for part in parts):
            return kind
    return OTHERS
