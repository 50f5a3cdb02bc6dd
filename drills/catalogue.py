"""Every drill, in full or in small."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import damage, images, kills, network, order, processes, saving, shuffling, storage
from .apparatus import sets
from .outcome import Outcome

Drill = Callable[[Path], Outcome]


def drills(quick: bool = False) -> dict[str, Drill]:
    """By name.

    Args:
        quick: fewer kills and combinations, and a small model in the place of ViT-B: for tests.
    """
    several = (2,) if quick else (2, 4)  # processes
    over_http = 22 if quick else network.STEPS
    return {
        "kills": partial(kills.kills_in_a_run, kills=2 if quick else 100),
        "saves": partial(kills.kills_in_saves, kills=3 if quick else 100),
        "sigterm": partial(kills.stop_signal, name="SIGTERM"),
        "sigusr1": partial(kills.stop_signal, name="SIGUSR1"),
        "full_disk": storage.full_disk,
        "damage": damage.damage_to_each_file,
        **{f"resumes_{kind.replace(' ', '_')}": partial(order.resumes, kind=kind) for kind in sets.KINDS},
        "orders": partial(order.orders, world_sizes=(1, *several), workers=(0, 2) if quick else (0, 2, 4)),
        "world_sizes": partial(order.world_sizes, steps=24 if quick else 48),
        "killed_process": processes.one_of_two_killed,
        "killed_worker": partial(processes.one_worker_killed, steps=40 if quick else 200),
        "uneven_shards": partial(images.uneven_shards, sizes=(700, 30, 500, 7)),
        "one_shard": partial(images.uneven_shards, sizes=(700,)),
        "bad_images": partial(images.bad_images, num_images=700 if quick else sets.NUM_IMAGES),
        "odd_formats": images.odd_formats,
        "faults": partial(network.faults, steps=over_http),
        "outage": partial(network.outage, num_processes=1, steps=over_http),
        "outage_for_two": partial(network.outage, num_processes=2, steps=over_http),
        "stop_in_outage": partial(network.stop_in_an_outage, steps=over_http),
        "nan": processes.not_a_number_on_one,
        "gate": processes.losses_on_two_sides_of_the_gate,
        "bf16": processes.in_bfloat16,
        "fp16": processes.in_float16,
        "lock": processes.two_runs_in_one_folder,
        "pickles": storage.files_that_execute,
        "archives": storage.names_that_climb,
        "gradients": partial(processes.gradients, world_sizes=several, accumulations=(1, 3)),
        "travel": shuffling.travel,
        "memory": shuffling.memory,
        "stall": partial(saving.stall, preset="vit-tiny", saves=2) if quick else saving.stall,
    }


ALONE = ("stall",)  # what is timed has the machine to itself
