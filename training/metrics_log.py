"""What a `transformers.Trainer` logs, as lines of `metrics.jsonl` and of the log."""

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .jsonl import append_jsonl, keep_jsonl

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TIMINGS = ("_runtime", "_per_second")  # of Trainer: noise, and no result


class MetricsLog(TrainerCallback):
    """Writes every logged number with its step; a resumed run forgets what the one before it logged later."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drops what was logged after the step that the run goes on from."""
        if state.is_world_process_zero:
            keep_jsonl(Path(args.output_dir) / METRICS_FILE, lambda entry: entry["step"] <= state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Adds a line to the file, and one to the log."""
        if not state.is_world_process_zero:
            return
        numbers = {name: value for name, value in logs.items() if not name.endswith(TIMINGS)}
        append_jsonl(Path(args.output_dir) / METRICS_FILE, [{"step": state.global_step, **numbers}])
        words = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        logger.info("step %d/%d  %s", state.global_step, state.max_steps, words)
