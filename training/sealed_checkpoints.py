"""Checkpoints of `transformers.Trainer` as safe as those of pre-training: damage is noticed, another run's refused."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .checkpoints import CheckpointStore, read_json, refuse_other_settings, seal, write_json
from .processes import on_main_process

SETTINGS_FILE = "settings.json"


class SealedCheckpoints(TrainerCallback):
    """Adds to each checkpoint the settings of its run, and the manifest by which `CheckpointStore` knows a whole one.

    It must be the last callback: what another writes into a checkpoint later would count as damage.

    Args:
        settings: what the result follows from, as JSON holds it.
    """

    def __init__(self, settings: dict[str, Any]):
        self._settings = settings

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seals what Trainer has just written. Collective: each process writes its own random state."""
        PartialState().wait_for_everyone()
        if args.should_save:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            write_json(folder / SETTINGS_FILE, self._settings)
            seal(folder)


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
