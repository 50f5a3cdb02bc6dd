"""What every script does first: processes, threads, logging, and the folder of the run."""

import logging
import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from transformers.utils import logging as transformers_logging

from ..flags.run import RunArguments
from ..training.processes import on_main_process
from ..version import __version__
from .run_folder import claim_output_dir

logger = logging.getLogger("mimae")


def start_logging(mixed_precision: str, recipe: Path) -> None:
    """Logs from the main process, errors from all; the first line says how many processes there are."""
    state = PartialState()
    logging.basicConfig(
        level=logging.INFO if state.is_main_process else logging.ERROR,
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    transformers_logging.disable_progress_bar()  # of every load and save
    logger.info(
        "world size %d on %s, precision %s, mimae %s", state.num_processes, state.device, mixed_precision, __version__
    )
    logger.info("recipe %s", recipe)


def precision(mixed_precision: str | None) -> str:
    """The flag's, or what `accelerate launch` and its configuration say."""
    return mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def start_processes(args: RunArguments, recipe: Path) -> Path:
    """The run's folder, held by the main process; the first line of the log says how many processes there are."""
    # the main one may be long at converting or listing a data set, and the others wait for it
    PartialState(cpu=args.use_cpu, timeout=timedelta(hours=2))
    if PartialState().device.type == "cpu" and args.cpu_threads is not None:  # of this machine, for all its processes
        torch.set_num_threads(max(1, args.cpu_threads // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    start_logging(precision(args.mixed_precision), recipe)
    resumes = args.resume_from_checkpoint is not None
    return on_main_process(lambda: claim_output_dir(args.output_dir, recipe, args.overwrite_output_dir, resumes))
