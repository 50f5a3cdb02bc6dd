"""Doing what is left, some runs at a time."""

import shutil
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import groupby
from pathlib import Path
from typing import Any

from .costs import operations
from .plan import PRETRAIN, Group, Run
from .records import Records
from .stages import StageError, end_stages, model_of, run_stage

Task = tuple[Group, Run, str]


def work(
    tasks: Iterable[Task], records: Records, folder: Path, *, jobs: int, machine: Mapping[str, Any], device: str
) -> list[str]:
    """Does what of the tasks is not done; each result is kept as soon as it is known.

    Args:
        tasks: in the order of the work; those of a run follow one another.
        folder: where runs leave their models.
        jobs: runs at a time.
        machine: see `run_stage`.
        device: that the work is done on, in words.

    Returns:
        What went wrong; of a run with a stage that failed, later stages are not begun.
    """
    left = [task for task in tasks if not records.find(task[1], task[2])]
    failures = []
    with ThreadPoolExecutor(jobs) as threads:
        futures = []
        for run, members in groupby(left, key=lambda task: task[1]):
            stages = [stage for _, _, stage in members]
            own = folder / f"{run}-{run.settings(PRETRAIN)}"
            futures.append(threads.submit(_do_stages, run, stages, records, own, machine, device))
        try:
            for future in as_completed(futures):
                try:
                    future.result()
                except StageError as error:
                    failures.append(str(error))
                    print(error, flush=True)
        except BaseException:  # interrupted, or a result cannot be kept
            threads.shutdown(wait=False, cancel_futures=True)
            end_stages()
            raise
    return failures


def _do_stages(
    run: Run, stages: list[str], records: Records, folder: Path, machine: Mapping[str, Any], device: str
) -> None:
    """Stages of one run, in order; the pre-training first, where its model is not there any more."""
    if PRETRAIN not in stages and not (model_of(folder) / "config.json").exists():
        stages = [PRETRAIN, *stages]
    for stage in stages:
        began = time.perf_counter()
        outcome = run_stage(run, stage, folder, machine)
        seconds = max(time.perf_counter() - began, outcome.get("seconds", 0.0))  # it may have begun in another start
        records.add(run, stage, outcome, operations=operations(run, stage), seconds=seconds, device=device)
        if stage == PRETRAIN and run.is_shown:
            shutil.copy(model_of(folder) / "reconstructions.png", records.picture(run))
        shown = "  ".join(f"{k} {v:.4g}" for k, v in outcome["metrics"].items() if v is not None)
        print(f"{run}  {stage}  {seconds:.0f} s  {shown}", flush=True)
