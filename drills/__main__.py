"""Runs drills, prints what came of each, and writes the table of all of them."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import __doc__ as description
from . import damage, kills, order, processes
from .outcome import Outcome
from .report import write_report

KILLS = 100

Drill = Callable[[Path], Outcome | list[Outcome]]

DRILLS: dict[str, Drill] = {
    "kills": lambda folder: kills.kills_in_a_run(folder, KILLS),
    "saves": lambda folder: kills.kills_in_saves(folder, KILLS),
    "signals": kills.stop_signals,
    "damage": damage.damage_to_each_file,
    "digits": lambda folder: order.resumes(folder, "embedded digits", {}),
    "world": order.world_sizes,
    "killed_process": processes.one_of_two_killed,
    "nan": processes.not_a_number_on_one,
    "lock": processes.two_runs_in_one_folder,
    "bf16": processes.in_bfloat16,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a drill has failed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drills", nargs="*", choices=[[], *DRILLS], metavar="drill", help=", ".join(DRILLS))
    chosen = parser.parse_args(argv).drills
    outcomes: list[Outcome] = []
    for name in chosen or DRILLS:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mimae-drill-") as folder:
            outcome = DRILLS[name](Path(folder))
        outcomes += outcome if isinstance(outcome, list) else [outcome]
        print(f"{name}: {outcome}, {time.monotonic() - started:.0f} s", flush=True)
    if not chosen:
        write_report(outcomes)
    return 0 if all(outcome.passed or outcome.skipped for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
