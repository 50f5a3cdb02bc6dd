"""Drills: real runs of the pre-training script, really killed, starved, damaged and misled, and what came of it.

python -m mimae.drills                # all of them, some half an hour on two cores; writes docs/reliability.md
python -m mimae.drills kills nan      # these, and their rows anew
"""

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from . import damage, images, kills, network, order, processes, report, saving, sets, shuffling, storage
from .outcome import Outcome, as_list
from .runs import HangError

KILLS = 100

Drill = Callable[[Path], Outcome | list[Outcome]]

DRILLS: dict[str, Drill] = {
    "kills": partial(kills.kills_in_a_run, kills=KILLS),
    "saves": partial(kills.kills_in_saves, kills=KILLS),
    "signals": kills.stop_signals,
    "full_disk": storage.full_disk,
    "damage": damage.damage_to_each_file,
    "resumes": lambda folder: [order.resumes(folder / kind, kind) for kind in sets.KINDS],
    "orders": partial(order.orders, world_sizes=(1, 2, 4), workers=order.WORKERS),
    "world_sizes": order.world_sizes,
    "killed_process": processes.one_of_two_killed,
    "shards": lambda folder: [
        images.uneven_shards(folder / str(len(sizes)), sizes) for sizes in ((700, 30, 500, 7), (700,))
    ],
    "bad_images": images.bad_images,
    "odd_formats": images.odd_formats,
    "faults": network.faults,
    "outage": lambda folder: [network.outage(folder / str(number), number) for number in (1, 2)],
    "nan": processes.not_a_number_on_one,
    "gate": processes.losses_on_two_sides_of_the_gate,
    "bf16": processes.in_bfloat16,
    "fp16": processes.in_float16,
    "lock": processes.two_runs_in_one_folder,
    "pickles": storage.files_that_execute,
    "archives": storage.names_that_climb,
    "gradients": partial(processes.gradients, world_sizes=(2, 4), accumulations=(1, 3)),
    "travel": shuffling.travel,
    "memory": shuffling.memory,
    "stall": saving.stall,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a drill has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drills", nargs="*", choices=[[], *DRILLS], metavar="drill", help=", ".join(DRILLS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="drills at a time (default: one a core)")
    arguments = parser.parse_args(argv)
    names = arguments.drills or list(DRILLS)
    has_failed = False
    with ThreadPoolExecutor(arguments.jobs) as threads:
        for name, (outcomes, seconds) in zip(names, threads.map(run_drill, names), strict=True):
            report.keep(name, outcomes, seconds)
            has_failed |= not all(outcome.passed or outcome.skipped for outcome in outcomes)
    return int(has_failed)


def run_drill(name: str) -> tuple[list[Outcome], float]:
    """What came of a drill, printed as soon as it is known, and how many seconds it took."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mimae-drill-") as folder:
        try:
            outcomes = as_list(DRILLS[name](Path(folder)))
        except HangError as error:
            outcomes = [Outcome(name, passed=False, figures={"hangs": 1, "error": str(error).splitlines()[0]})]
            print(error, flush=True)
        except Exception as error:  # the other drills are to be run all the same
            outcomes = [Outcome(name, passed=False, figures={"error": repr(error)[:200]})]
            traceback.print_exc()
    seconds = time.monotonic() - started
    for each in outcomes:
        print(f"{name} ({seconds:.0f} s): {report.verdict(vars(each))}, {each.drill}: {each.figures}", flush=True)
    return outcomes, seconds


if __name__ == "__main__":
    sys.exit(main())
