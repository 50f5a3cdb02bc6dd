"""Time and memory of one step at full size: UperNet on a ViT-B at 512 px, Mask R-CNN on a ViT-B at 1024 px (ViTDet).

    python benchmarks/dense_step.py segmentation
    python benchmarks/dense_step.py detection --forward_only    # on a CPU its training step takes minutes

Images are scenes that `mimae.data.scenes` composes of digits at that size, read, augmented and stacked as in training.
One line of JSON per run; times are of a first and only step, memory is the process's peak.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mimae import MIMAEBackbone, MIMAEConfig
from mimae.data.batches.dense import DenseLoader
from mimae.data.images.detection_augmentation import large_scale_jitter
from mimae.data.images.segmentation_augmentation import segmentation_training_transform
from mimae.data.images.transforms import channel_statistics
from mimae.data.scenes import main as compose_scenes
from mimae.data.sources.coco import CocoSource
from mimae.data.sources.dense import DenseSource
from mimae.data.sources.segmentation import open_segmentation_source
from mimae.dense.mask_rcnn import VITDET_BASE, build_mask_rcnn
from mimae.dense.upernet import build_upernet
from mimae.jobs.results import device_name, package_versions, source_commit
from mimae.training.optimization import build_finetuning_adamw

CROP_SIZE = 512
BATCH_SIZES = {"segmentation": 2, "detection": 1}


def scenes(folder: Path, size: int) -> Path:
    """A few scenes of this size."""
    counts = ["--pretrain_images", "0", "--train_images", "2", "--validation_images", "0"]
    compose_scenes(["--output_dir", str(folder), "--scene_size", str(size), *counts])
    return folder


def segmentation(folder: Path) -> tuple[Any, DenseSource, Any]:
    """UperNet as MAE has it for ADE20K, its images and its augmentation."""
    source = open_segmentation_source(train_dir=scenes(folder, CROP_SIZE))
    config = MIMAEConfig.preset(
        "vit-base", image_size=CROP_SIZE, add_fpn=True, use_relative_position_bias=True, drop_path_rate=0.1
    )
    model = build_upernet(MIMAEBackbone(config), id2label=dict(enumerate(source.class_names)))
    mean, std = channel_statistics(3, None, None)
    transform = segmentation_training_transform(
        CROP_SIZE, mean=mean, std=std, short_side=CROP_SIZE, long_side_limit=4 * CROP_SIZE
    )
    return model, source, transform


def detection(folder: Path) -> tuple[Any, DenseSource, Any]:
    """Mask R-CNN as ViTDet has it for COCO, its images and its augmentation."""
    size = VITDET_BASE["image_size"]
    scenes(folder, size)
    source = CocoSource(folder / "annotations/instances_train.json", folder / "images/train", keep_empty=False)
    backbone = MIMAEBackbone(MIMAEConfig.preset("vit-base", **VITDET_BASE))
    model = build_mask_rcnn(backbone, id2label=dict(enumerate(source.class_names)))
    mean, std = channel_statistics(3, None, None)
    return model, source, large_scale_jitter(size, mean=mean, std=std)


def measure(task: str, folder: Path, device: torch.device, *, forward_only: bool) -> dict[str, Any]:
    """Builds the model, reads a batch, and takes a step, or looks at the images once."""
    torch.manual_seed(0)
    model, source, transform = {"segmentation": segmentation, "detection": detection}[task](folder)
    loader = DenseLoader(source, transform=transform, num_channels=3, per_device_batch_size=BATCH_SIZES[task])
    batch = next(iter(loader))
    pixel_values, labels = batch["pixel_values"].to(device), _on(device, batch["labels"])
    model.to(device).train(not forward_only)
    optimizer = build_finetuning_adamw(model, learning_rate=1e-4, weight_decay=0.05, layer_decay=0.7)
    _settle(device)
    start = time.perf_counter()
    if forward_only:
        with torch.no_grad():
            model(pixel_values)
        loss = None
    else:
        loss = model(pixel_values, labels).loss
        loss.backward()
        optimizer.step()
    _settle(device)
    return {
        "task": task,
        "step": "forward" if forward_only else "forward, backward, AdamW",
        "images": len(pixel_values),
        "side": pixel_values.shape[-1],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(time.perf_counter() - start, 2),
        "peak_memory_gib": round(_peak_memory(device) / 2**30, 2),
        "loss": None if loss is None else loss.item(),
    }


def _on(device: torch.device, labels: torch.Tensor | list[dict[str, torch.Tensor]]) -> Any:
    if isinstance(labels, torch.Tensor):
        return labels.to(device)
    return [{name: value.to(device) for name, value in each.items()} for each in labels]


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's memory, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Prints, and if asked to writes, one run's figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("segmentation", "detection"))
    parser.add_argument("--forward_only", action="store_true", help="in evaluation mode, without gradients")
    parser.add_argument("--output", type=Path, help="a JSON file, too")
    flags = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(flags.task, Path(folder), device, forward_only=flags.forward_only)
    figures |= {"device": device_name(device), "versions": package_versions(), "commit": source_commit()}
    text = json.dumps(figures)
    print(text)
    if flags.output:
        flags.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
