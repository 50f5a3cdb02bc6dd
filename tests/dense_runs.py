"""Small runs of the two dense scripts for tests: composed scenes of digits, a tiny encoder, and their flags."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from references import TINY
from runs import ROOT
from torchvision.transforms.v2.functional import normalize, pil_to_tensor, to_dtype

from mimae import MIMAEConfig, MIMAEForPreTraining, run_object_detection, run_semantic_segmentation
from mimae.data import scenes
from mimae.flags.recipes import as_argv

SCENE_SIZE = 48
CROP_SIZE = 32
ENCODER = {**TINY, "num_hidden_layers": 6}
SCRIPTS = {"segmentation": run_semantic_segmentation, "detection": run_object_detection}
SHORT = {
    "use_cpu": True,
    "cpu_threads": 1,
    "report_to": "none",
    "max_train_steps": 4,
    "warmup_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "logging_steps": 1,
    "evaluation_steps": 2,
    "checkpointing_steps": 2,
    "learning_rate": 1e-3,
}
SIZES = {
    "segmentation": {
        "crop_size": CROP_SIZE,
        "short_side": SCENE_SIZE,
        "upernet_channels": 8,
        "auxiliary_channels": 8,
    },
    "detection": {
        "image_size": SCENE_SIZE,
        "window_size": 6,
        "min_scale": 0.75,
        "max_scale": 1.5,
        "pyramid_channels": 8,
        "head_channels": 8,
        "box_features": 16,
        "rpn_batch_size_per_image": 16,
        "rpn_post_nms_top_n": 16,
        "box_batch_size_per_image": 8,
        "score_threshold": 0.0,
    },
}


def compose(folder: Path, train: int = 8, validation: int = 3) -> Path:
    """Scenes of digits; with an odd number to validate on, two processes have unequal shares."""
    sizes = {"scene_size": SCENE_SIZE, "pretrain_images": 1, "train_images": train, "validation_images": validation}
    scenes.main(command_line(output_dir=folder, **sizes))
    return folder


def copied(folder: Path, to: Path) -> Path:
    """A copy of scenes, to be spoilt."""
    return Path(shutil.copytree(folder, to))


def edit_annotations(folder: Path, split: str, edit: Callable[[dict], Any]) -> None:
    """Changes what COCO's file of a split says."""
    path = folder / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def save_encoder(folder: Path) -> Path:
    """A checkpoint of pre-training, with random weights."""
    torch.manual_seed(1)
    MIMAEForPreTraining(MIMAEConfig(**ENCODER)).save_pretrained(folder)
    return folder


def places(task: str, images: Path) -> dict[str, Path]:
    """The flags that name composed scenes."""
    if task == "segmentation":
        return {"train_dir": images}
    return {
        f"{split}_{name}": images / path
        for split in ("train", "validation")
        for name, path in (
            ("annotation_file", f"annotations/instances_{split}.json"),
            ("image_dir", f"images/{split}"),
        )
    }


def command_line(**values: Any) -> list[str]:
    """Flags with their values; None leaves one out."""
    return as_argv({name: value for name, value in values.items() if value is not None})


def flags(task: str, images: Path, model: Path | None, output_dir: Path, **values: Any) -> list[str]:
    """The command line of a short run of few, small layers, with `values` on top."""
    given = {"model_name_or_path": model, "output_dir": output_dir, **places(task, images)}
    return command_line(**{**SHORT, **SIZES[task], **given, **values})


def run(task: str, images: Path, model: Path | None, output_dir: Path, **values: Any) -> dict[str, Any]:
    """Runs in this process and returns what results.json holds."""
    assert SCRIPTS[task].main(flags(task, images, model, output_dir, **values)) == 0
    return json.loads((output_dir / "results.json").read_text())


def launch(task: str, argv: list[str], *launcher: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs in processes of their own."""
    return subprocess.run(
        [sys.executable, *launcher, str(Path(SCRIPTS[task].__file__)), *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def normalised(path: Path) -> torch.Tensor:
    """An image as models see it that start from a checkpoint without an image processor: (3, H, W)."""
    pixels = to_dtype(pil_to_tensor(Image.open(path)), torch.float32, scale=True)
    return normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
