"""Callbacks that make checkpoints of `transformers.Trainer` as safe as pre-training's, and stop a run in order."""

import logging
import math
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...data.batches.supervised import TrainingLoader
from ...data.words import some
from ..bad_images import TooManyBadImagesError
from ..checkpoints.files import read_json, write_json
from ..checkpoints.state import refuse_other_settings
from ..checkpoints.store import CheckpointStore, seal
from ..metrics import MetricsFile
from ..processes import everywhere, on_main_process
from ..signals import StopRequest

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"


class SealedCheckpoints(TrainerCallback):
    """Adds to each checkpoint the settings of its run, and the manifest by which `CheckpointStore` knows a whole one.

    It must be the last callback: what another writes into a checkpoint later would count as damage. The settings are
    what the result follows from, as JSON holds it.
    """

    def __init__(self, settings: dict[str, Any]):
        self._settings = settings

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seals what Trainer has just written. Collective: each process writes its own random state."""
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

        def write() -> None:
            write_json(folder / SETTINGS_FILE, self._settings)
            seal(folder)

        PartialState().wait_for_everyone()
        on_main_process(write)


def checkpoint_to_resume(output_dir: Path, value: str, settings: dict[str, Any]) -> tuple[Path, int]:
    """The checkpoint that `--resume_from_checkpoint` means, and its step; later ones of the run are removed.

    Raises:
        CheckpointError: there is none that is whole, or the one named is damaged.
        ValueError: it is of a run with other settings; names them.
    """
    store = CheckpointStore(output_dir, total_limit=None)
    folder = on_main_process(lambda: store.resolve(value))
    refuse_other_settings(read_json(folder / SETTINGS_FILE), settings)
    step = read_json(folder / "trainer_state.json")["global_step"]
    on_main_process(lambda: store.discard_after(step))
    return folder, step


TIMINGS = ("_runtime", "_per_second")  # of Trainer: noise, and no result


class MetricsCallback(TrainerCallback):
    """Writes every logged number with its step; a resumed run forgets what the one before it logged later."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Drops what was logged after the step that the run goes on from."""
        MetricsFile(Path(str(args.output_dir))).begin(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds a line to the file, and one to the log."""
        numbers = {name: value for name, value in kwargs["logs"].items() if not name.endswith(TIMINGS)}
        MetricsFile(Path(str(args.output_dir))).write(state.global_step, numbers)
        words = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        logger.info("step %d/%d  %s", state.global_step, state.max_steps, words)


class StopOnSignal(TrainerCallback):
    """Ends a training after the step in which a stop signal came, `signum` (0: none has), with a checkpoint."""

    def __init__(self, stop_request: StopRequest):
        self._stop_request, self.signum = stop_request, 0

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Collective: all processes end at the same step."""
        self.signum = self._stop_request.agreed()
        if self.signum:
            control.should_save = control.should_training_stop = True


class BadImageLimit(TrainerCallback):
    """Stops a training after an epoch by which a larger part of its images than this could not be decoded."""

    def __init__(self, loader: TrainingLoader, max_fraction: float):
        self._loader, self._max_fraction = loader, max_fraction
        self._count = 0

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raises: TooManyBadImagesError, on all processes alike."""
        bad_images = everywhere(self._loader.bad_images)
        count, num_images = len(set(bad_images)), len(self._loader.dataset.source)
        if count > self._count and state.is_world_process_zero:
            logger.warning("%d training image(s) could not be decoded and were replaced: %s", count, some(bad_images))
        self._count = count
        if count > self._max_fraction * num_images:
            raise TooManyBadImagesError(
                f"{count} of {num_images} training images cannot be decoded, more than --max_bad_image_fraction "
                f"{self._max_fraction}: {some(bad_images)}. Mend or remove them, or raise the fraction"
            )


class StopAtNonFiniteLoss(TrainerCallback):
    """Ends a run whose loss is no longer finite; Trainer would go on to the last step."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raises: FloatingPointError, on all processes alike, because the logged loss is their mean."""
        logs: dict[str, float] = kwargs["logs"]
        losses = [logs[name] for name in ("loss", "train_loss", "eval_loss") if name in logs]
        if not all(map(math.isfinite, losses)):
            raise FloatingPointError(
                f"the loss was {losses[0]} by step {state.global_step}. A lower learning rate, a longer warm-up or "
                "a max_grad_norm may help, or bf16 or float32 in place of fp16; go on from a checkpoint before it"
            )
