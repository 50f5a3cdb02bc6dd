"""The stages of a run, each in a process of its own, by the scripts that a user would call."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from mimae import run_image_classification, run_mim_pretrain
from mimae.flags.recipes import as_argv, read_recipe
from mimae.training.jsonl import read_jsonl

from .frozen import measure_frozen
from .plan import ALL, CORRUPTED, FEW, FEW_SEEDS, FROZEN, PRETRAIN, Run

SERIES = ("reconstruction_loss", "mi_max_loss", "mi_min_loss", "mi_active")
POINTS = 40  # of a series that are kept
OUTCOME = "outcome.json"
SEEDS_APART = 1000  # of several fine-tunings of one model: more than there are runs of an arm
# one of each kind: noise, blur, weather, digital
CORRUPTIONS = ["gaussian_noise", "defocus_blur", "fog", "contrast", "pixelate"]
# a child is forked from a server that has imported all this once
_context = get_context("forkserver")
_context.set_forkserver_preload([__name__])


class StageError(RuntimeError):
    """A stage has not come to its end; its log says why."""


def run_stage(run: Run, stage: str, folder: Path, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Does a stage of a run in a process of its own, and returns what came of it.

    Args:
        folder: of this run; a pre-training that was ended goes on from its checkpoint.
        machine: flags that are of the machine and change no result: `cpu_threads`, `use_cpu`, and `train_dir`, where
            the images lie.

    Raises:
        StageError: with the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log, outcome = folder / f"{stage}.log", folder / OUTCOME
    outcome.unlink(missing_ok=True)
    process = _context.Process(target=_child, args=(run, stage, folder, dict(machine), log))
    process.start()
    process.join()
    if process.exitcode or not outcome.exists():
        end = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-20:]) if log.exists() else ""
        raise StageError(f"{stage} of {run} ended with exit code {process.exitcode}; {log} ends so:\n{end}")
    return json.loads(outcome.read_text())


def end_stages() -> None:
    """Asks all that are running to end; a pre-training saves a checkpoint first."""
    for process in active_children():
        process.terminate()


def _child(run: Run, stage: str, folder: Path, machine: dict[str, Any], log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(machine["cpu_threads"])
    try:
        outcome = _STAGES[stage](run, folder, machine)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    (folder / OUTCOME).write_text(json.dumps(outcome))


def pretrain(run: Run, folder: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """The pre-training; what is kept is the course of its terms, and the time of its steps over all starts."""
    output_dir = model_of(folder)
    flags = {"config": run.recipe, **run.flags, **machine, "output_dir": output_dir}
    begun = any(output_dir.glob("checkpoint-*"))
    flags |= {"resume_from_checkpoint": "latest"} if begun else {"overwrite_output_dir": True}
    _succeed(run_mim_pretrain.main(as_argv(flags)))
    lines = [line for line in read_jsonl(output_dir / "metrics.jsonl") if "reconstruction_loss" in line]
    kept = lines[:: -(-len(lines) // POINTS)]
    series = {name: [_short(line[name]) for line in kept] for name in ("step", *SERIES)}
    opened = [line["step"] for line in lines if line["mi_active"]]
    last = {name: _short(lines[-1][name]) for name in SERIES[:3]}
    ends = [0, *(line["step"] for line in lines)]
    seconds = sum(
        (end - begin) * line["seconds_per_step"] for line, (begin, end) in zip(lines, pairwise(ends), strict=True)
    )
    return {
        "metrics": {**last, "gate_opened_at": opened[0] if opened else None},
        "series": series,
        "seconds": seconds,
    }


def frozen(run: Run, folder: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """See `measure_frozen`."""
    recipe = read_recipe(run.recipe) | {"train_dir": machine["train_dir"]}
    device = torch.device("cpu" if machine["use_cpu"] else "cuda")
    return {"metrics": measure_frozen(model_of(folder), recipe, device)}


def finetune(run: Run, folder: Path, machine: dict[str, Any], stage: str) -> dict[str, Any]:
    """Fine-tuning; the metric is the accuracy on the test images, in percent, on few images a mean over some seeds."""
    seeds = [run.seed + SEEDS_APART * number for number in range(FEW_SEEDS if stage == FEW else 1)]
    flags = [{"model_name_or_path": model_of(folder), "seed": seed} for seed in seeds]
    accuracies = [100 * _classify(run, folder, machine, stage, each)["metrics"]["accuracy"] for each in flags]
    return {"metrics": {stage: fmean(accuracies)}, "each": accuracies}


def corrupt(run: Run, folder: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """The fine-tuned model on corrupted test images: the mean accuracy over corruptions and severities."""
    flags = {"task": "evaluate", "model_name_or_path": folder / ALL, "corruptions": CORRUPTIONS}
    record = _classify(run, folder, machine, CORRUPTED, flags)
    return {"metrics": {CORRUPTED: 100 * (1 - record["robustness"]["corruptions"]["mean_error"])}}


def _classify(run: Run, folder: Path, machine: dict[str, Any], stage: str, flags: dict[str, Any]) -> dict[str, Any]:
    output_dir = folder / stage
    common = {
        "config": run.scale.finetuning(stage),
        "output_dir": output_dir,
        "overwrite_output_dir": True,
    }
    _succeed(run_image_classification.main(as_argv({**common, **flags, **machine})))
    return json.loads((output_dir / "results.json").read_text())


def model_of(folder: Path) -> Path:
    """Where the pre-training of a run leaves its model."""
    return folder / PRETRAIN


def _succeed(code: int) -> None:
    if code:
        sys.exit(code)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


_STAGES: dict[str, Callable[..., dict[str, Any]]] = {
    PRETRAIN: pretrain,
    FROZEN: frozen,
    FEW: partial(finetune, stage=FEW),
    ALL: partial(finetune, stage=ALL),
    CORRUPTED: corrupt,
}
