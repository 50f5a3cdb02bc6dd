"""Drills: real runs of the pre-training script, really killed, starved, damaged and misled, and what came of it.

python -m mimae.drills                # all of them, some half an hour on two cores; writes docs/reliability.md
python -m mimae.drills kills nan      # these, and their rows anew
"""

import argparse
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import datasets

from .apparatus.runs import HangError, end_runs
from .catalogue import ALONE, Drill, drills
from .outcome import Outcome
from .report import Report, verdict

MOST_AT_A_TIME = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a drill has failed."""
    every = drills()
    parser = argparse.ArgumentParser(
        "python -m mimae.drills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("drills", nargs="*", metavar="drill", help=", ".join(every))
    parser.add_argument("--jobs", type=int, help=f"drills at a time (default: one a core, at most {MOST_AT_A_TIME})")
    arguments = parser.parse_args(argv)
    names = list(dict.fromkeys(arguments.drills)) or list(every)
    if unknown := [name for name in names if name not in every]:
        parser.error(f"no drill is called {', '.join(unknown)}; there are {', '.join(every)}")
    jobs = arguments.jobs or min(MOST_AT_A_TIME, os.cpu_count() or 1)
    page = Report(order=list(every), jobs=jobs)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    datasets.disable_progress_bars()
    logging.getLogger("mimae").setLevel(logging.ERROR)  # warnings of damage are what is asked for
    try:
        for part, at_a_time in (([n for n in names if n not in ALONE], jobs), ([n for n in names if n in ALONE], 1)):
            run_drills({name: every[name] for name in part}, at_a_time, page)
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", flush=True)
        return 130
    return int(page.has_failed)


def run_drills(chosen: dict[str, Drill], jobs: int, page: Report) -> None:
    """Runs some at a time; what came of each is kept as soon as it is known."""
    with ThreadPoolExecutor(jobs) as threads:
        running = {threads.submit(run_drill, name, drill): name for name, drill in chosen.items()}
        try:
            for done in as_completed(running):
                page.keep(running[done], *done.result())
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            end_runs()
            raise


def run_drill(name: str, drill: Drill) -> tuple[Outcome, float]:
    """What came of a drill, and how many seconds it took. What a failed one has left is kept, to be looked at."""
    started, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix=f"mimae-drill-{name}-"))
    failed = partial(Outcome, "it could not be run to its end", passed=False)
    try:
        outcome = drill(folder)
    except HangError as error:
        outcome = failed(figures={"hangs": 1, "error": str(error).splitlines()[0]})
        print(error, flush=True)
    except Exception as error:  # the other drills are to be run all the same
        outcome = failed(figures={"error": repr(error)[:200]})
        traceback.print_exc()
    finally:
        end_runs(folder)
    seconds = time.monotonic() - started
    print(f"{name} ({seconds:.0f} s): {verdict(vars(outcome))}, {outcome.drill}: {outcome.figures}", flush=True)
    if outcome.passed or outcome.skipped:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"what it has left is in {folder}", flush=True)
    return outcome, seconds


if __name__ == "__main__":
    sys.exit(main())
