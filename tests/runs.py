"""Small pre-training runs for tests."""

import io
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from references import TINY_SWIN
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from mimae.flags.recipes import as_argv
from mimae.run_mim_pretrain import main
from mimae.training.protocols import TrainingObserver

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "run_mim_pretrain.py"
# 16 patches, 4 of them visible to each of 4 masks; a step takes milliseconds
TINY_MODEL = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
# the same for a Swin: 16 units of a mask, 8 of them visible to each of 2
TINY_SWIN_MODEL = {"model_type": "misimmim", **TINY_SWIN}
# 5 steps an epoch of 1,437 digits; probes and pictures only at both ends
SHORT_RUN = {
    "cpu_threads": 1,
    "per_device_train_batch_size": 256,
    "max_train_steps": 13,
    "logging_steps": 1,
    "report_to": "none",
}


def flags(output_dir, model: Mapping[str, Any] = TINY_MODEL, **values) -> list[str]:
    """The command line of a tiny, short run on a CPU, with `values` on top."""
    values = {**model, **SHORT_RUN, "evaluation_steps": 1000, "probe_samples": 64, **values}
    return ["--use_cpu", "--output_dir", str(output_dir), *as_argv(values)]


def pretrain(output_dir, *extra: str, observer: TrainingObserver | None = None, **values) -> int:
    """Runs in this process and returns the exit code."""
    return main([*flags(output_dir, **values), *extra], observer)


class SignalAfter(TrainingObserver):
    """Sends a run in this process a real signal right after a step."""

    def __init__(self, step: int, signum: int = signal.SIGTERM):
        self.step, self.signum = step, signum

    def on_step(self, step: int) -> None:
        if step == self.step:
            os.kill(os.getpid(), self.signum)


def metrics(output_dir) -> list[dict]:
    """The lines of `metrics.jsonl`."""
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def series(output_dir, name: str) -> dict[int, float]:
    """One metric by step."""
    return {line["step"]: line[name] for line in metrics(output_dir) if name in line}


def weights(output_dir) -> dict:
    """The final model's tensors."""
    return load_file(Path(output_dir) / "model.safetensors")


def write_shards(folder: Path, num_shards: int = 3, rows_per_group: int = 60) -> str:
    """The digits as parquet, as on the Hub: encoded images, several files, several row groups each. Returns a glob."""
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    rows = []
    for image, label in zip(digits.images, digits.target, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)).save(buffer, format="PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": int(label)})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    whole = datasets.Dataset.from_list(rows, features=features)
    for shard in range(num_shards):
        part = whole.shard(num_shards, shard, contiguous=True)
        part.to_parquet(folder / f"train-{shard:05d}.parquet", batch_size=rows_per_group)
    return str(folder / "*.parquet")
