"""Which of the paper's findings hold in small? Trains and measures what is not done yet, and writes the page.

    python -m mimae.replication                  # all of the scale `small`; may be ended and begun again
    python -m mimae.replication mae mi-mae       # these arms alone
    python -m mimae.replication --list           # the plan, what is done, and the time that is left
    python -m mimae.replication --again mi-mae   # one run with a new seed, beside what is known of its arm

Exit codes: 0 done; 1 a stage has failed, or a new run lies outside of an interval; 130 interrupted.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mimae.flags.recipes import read_recipe
from mimae.jobs.results import device_name

from ..benchmarks.measurement import Table, markdown_table
from .costs import price
from .intervals import prediction_interval
from .plan import ARMS, GROUPS, SCALES, STAGES, Arm, Run, Scale, tasks
from .records import Records
from .report import METRICS, write_report
from .results import metrics_by_seed
from .stages import run_stage
from .work import work

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs, lists or checks, as the flags say."""
    flags = parse(argv)
    scale = SCALES[flags.scale]
    records = Records(flags.output_dir / "replication" / f"{scale.name}.jsonl")
    use_cpu = not torch.cuda.is_available()
    threads = max(1, (os.cpu_count() or 1) // flags.jobs)
    torch.set_num_threads(threads)
    device = device_name(torch.device("cpu" if use_cpu else "cuda"))
    if flags.list:
        print("\n".join(listing(scale, records, device, flags.jobs)))
        return 0
    machine = {"use_cpu": use_cpu, "cpu_threads": threads, "train_dir": images_in(scale, flags.train_dir)}
    if flags.again:
        return run_again(ARMS[flags.again], scale, records, flags.work_dir / "again", machine)
    chosen = [task for task in tasks(scale) if not flags.arms or task[1].arm.name in flags.arms]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = flags.work_dir / scale.name
    try:
        failures = work(chosen, records, folder, jobs=flags.jobs, machine=machine, device=device)
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", flush=True)
        return 130
    finally:
        write_report(flags.output_dir, ROOT / "README.md" if flags.output_dir == DOCS else None)
    return int(bool(failures))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked."""
    parser = argparse.ArgumentParser(
        "python -m mimae.replication",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arms", nargs="*", metavar="arm", help=f"of {', '.join(ARMS)}; default: all")
    parser.add_argument("--scale", choices=SCALES, default="small", help="default: small; vit-tiny wants a GPU")
    parser.add_argument("--list", action="store_true", help="show the plan, and do nothing")
    parser.add_argument("--again", metavar="ARM", help="run one arm with a new seed, and record nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time; default: one a core")
    parser.add_argument("--train_dir", type=Path, help="where Fashion-MNIST's IDX files lie; default: Debian's place")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/replication"), help="where runs leave models")
    parser.add_argument("--output_dir", type=Path, default=DOCS, help="where the page and its records go")
    flags = parser.parse_args(argv)
    if unknown := {*flags.arms, flags.again} - {*ARMS, None}:
        parser.error(f"no arm is called {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    if flags.jobs < 1:
        parser.error(f"--jobs {flags.jobs}: at least 1")
    return flags


def images_in(scale: Scale, train_dir: Path | None) -> str:
    """Where the images lie.

    Raises:
        SystemExit: they are not there; says how to get them.
    """
    folder = str(train_dir or read_recipe(scale.recipe)["train_dir"])
    if not Path(folder).is_dir():
        sys.exit(
            f"Fashion-MNIST is not in {folder}: apt-get install dataset-fashion-mnist, or give the folder of its four "
            "IDX files, --train_dir"
        )
    return folder


def listing(scale: Scale, records: Records, device: str, jobs: int) -> list[str]:
    """The plan: of each group what there is to do, what is done, and the time that is left on this machine."""
    rows: list[list[Any]] = [
        [group.title, stages, stages - left, left, None if hours is None else hours / jobs]
        for group, stages, left, _, hours in price(scale, records, device)
    ]
    rows.append(["all", *(sum(row[place] or 0 for row in rows) for place in range(1, 5))])
    columns = ("group", "stages", "done", "left", f"hours left, {jobs} at a time")
    return [f"Scale {scale.name}, {device}", "", *markdown_table(Table("", columns, rows))]


def run_again(arm: Arm, scale: Scale, records: Records, folder: Path, machine: dict[str, Any]) -> int:
    """One run of an arm with a seed that no record has, of the shortest length that is known; nothing is recorded.

    Returns:
        1 if one of its accuracies lies outside of the prediction interval that the records give for one new run.
    """
    seeds = max(group.seeds for group in GROUPS)
    for steps in scale.steps if arm.is_trained else (1,):
        *recorded, run = (Run(scale, arm, steps, seed) for seed in range(seeds + 1))
        if known := metrics_by_seed(recorded, records):
            break
    else:
        sys.exit(f"nothing is known of {arm.name} at the scale {scale.name}: there is no interval to compare with")
    found: dict[str, Any] = {}
    for stage in STAGES:
        if records.find(recorded[0], stage):
            print(f"{run}: {stage} ...", flush=True)
            found |= run_stage(run, stage, folder / str(run), machine)["metrics"]
    rows = []
    for metric, words in METRICS.items():
        if metric in found:
            interval = prediction_interval(list(known[metric].values()))
            inside = "inside" if found[metric] in interval else "outside"
            rows.append([words, found[metric], f"{interval.low:.2f} to {interval.high:.2f}", interval.n, inside])
    columns = (str(run), "this run", "95 % prediction interval", "of n", "")
    print("\n".join(markdown_table(Table("", columns, rows))))
    return int(any(row[-1] == "outside" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
