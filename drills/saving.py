"""What a checkpoint of ViT-B costs, in seconds and as a share of the training that it interrupts."""

import statistics
from pathlib import Path

import yaml

from .apparatus import sets
from .apparatus.runs import Run
from .outcome import Outcome

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "imagenet" / "mimae_vit_base_200e.yaml"
IMAGES_PER_EPOCH = 1_281_167
RATE = 8 * 1_500  # images per second: what the recipe's 8 GPUs are assumed to do
SHARE = "share of the training time of mimae_vit_base_200e.yaml"


def stall(folder: Path, preset: str = "vit-base", saves: int = 4) -> Outcome:
    """Trains a model at full size for a few steps, each with a checkpoint."""
    flags = {
        "preset": preset,
        "train_dir": sets.write_folder(folder / "images", sets.encoded_digits()[:16]),
        "cache_dir": folder / "cache",
        "streaming": False,
        "dataloader_num_workers": 0,
        "per_device_train_batch_size": 2,
        "max_train_steps": saves,
        "checkpointing_steps": 1,
        "evaluation_steps": 1000,
        "logging_steps": 1,
        "probe_samples": 0,
        "report_to": "none",
        "mixed_precision": "no",
        "torch_compile": False,
        "use_cpu": True,
        "cpu_threads": 1,
    }
    run = Run(folder / "run", flags, recipe=RECIPE).finish()
    seconds = statistics.median(line["seconds"] for line in run.record.lines() if "seconds" in line)
    size = sum(path.stat().st_size for path in (run.output_dir / f"checkpoint-{saves}").rglob("*"))
    epochs = yaml.safe_load(RECIPE.read_text())["checkpointing_epochs"]
    between = epochs * IMAGES_PER_EPOCH / RATE
    share = seconds / (seconds + between)
    return Outcome(
        drill=f"checkpoints of {preset}",
        passed=share < 0.02,
        figures={
            "save stall in seconds (median)": round(seconds, 1),
            "checkpoint in GB": round(size / 1e9, 2),
            SHARE: f"{share:.1%}",
            "that saves every so many epochs": epochs,
            "at assumed images per second": RATE,
            "so every so many seconds": round(between),
        },
    )
