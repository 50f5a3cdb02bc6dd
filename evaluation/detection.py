"""Average precision of boxes and masks, as COCO defines it.

Shapes: n detections in an image, H, W the original image's height and width, h, w those of the resized picture that
the model saw, M side of a predicted mask.

The counting is faster-coco-eval's, in C++; a test holds it equal to pycocotools. Detections travel as COCO's records,
plain dicts of numbers and text, with masks as run-length codes: they fit in memory and can be gathered from several
processes, or written as JSON.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as run_length

from ..data.sources.coco import Annotation, CocoAnnotations, compressed_mask, is_crowd, read_annotations

logger = logging.getLogger(__name__)

Record = dict[str, Any]

MASK_THRESHOLD = 0.5
TARGET_SHIFT = 0.5  # pixels of the model's image: torchvision samples a mask's target by so much to the upper left
KINDS = {"box": ("bbox", "bbox"), "mask": ("segm", "segmentation")}  # the evaluator's name, and the record's key
# COCO's twelve numbers, in its order; AP over IoU 0.5 to 0.95 unless said, AR with at most so many detections
NAMES = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)


def restore_detections(
    detections: dict[str, torch.Tensor], *, image_size: Sequence[int], original_size: Sequence[int]
) -> dict[str, Any]:
    """Maps an image's detections from the model's pixels to those of the original image.

    Args:
        detections: `boxes` (n, 4), left, top, right, bottom; `scores` (n,); `labels` (n,), 0..K-1; `masks`
            (n, 1, M, M), probabilities within each box.
        image_size: (h, w) of the picture that the boxes refer to.
        original_size: (H, W).

    Returns:
        The same on the CPU, boxes clipped to the image, and `masks` a list of n compressed run-length codes of size
        (H, W): pixels with a probability of at least 0.5.

    Raises:
        ValueError: boxes or scores that are no finite numbers.
    """
    boxes, scores, masks = (detections[key].detach().float().cpu() for key in ("boxes", "scores", "masks"))
    if not (boxes.isfinite().all() and scores.isfinite().all()):
        raise ValueError("detections have boxes or scores that are not finite: the model's weights have diverged")
    height, width = original_size
    scale = torch.tensor([width / image_size[1], height / image_size[0]]).repeat(2)
    shifted = (boxes + TARGET_SHIFT) * scale
    boxes = (boxes * scale).clamp(min=torch.zeros(4), max=torch.tensor([width, height, width, height]))
    return {
        "boxes": boxes,
        "scores": scores,
        "labels": detections["labels"].cpu(),
        # one by one: a hundred masks of a large photograph, as floats, would fill the memory
        "masks": [_pasted(mask, box, (height, width)) for mask, box in zip(masks, shifted, strict=True)],
    }


def detection_records(detections: dict[str, Any], *, image_id: int, category_ids: Sequence[int]) -> list[Record]:
    """An image's detections, as `restore_detections` gives them, in COCO's format of results.

    Args:
        image_id: the annotation file's.
        category_ids: of the K labels, in order, as `CocoSource.category_ids`.
    """
    corners, scores, labels = (detections[key].tolist() for key in ("boxes", "scores", "labels"))
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": [left, top, right - left, bottom - top],
            "score": score,
            "segmentation": mask,
        }
        for (left, top, right, bottom), score, label, mask in zip(
            corners, scores, labels, detections["masks"], strict=True
        )
    ]


def detection_metrics(
    annotation_file: str | PathLike[str], records: Sequence[Record], *, image_ids: Iterable[int] | None = None
) -> dict[str, float]:
    """COCO's twelve numbers for boxes and for masks.

    Objects that `read_annotations` leaves out of training do not count here either; crowds are regions in which
    detections are ignored. A mask's size, for the ranges small, medium and large, is its own area, not its box's.

    Args:
        annotation_file: the truth.
        records: as `detection_records` gives them, of all images and processes, each image once.
        image_ids: of the evaluated images; None: all of the file.

    Returns:
        Fractions in [0, 1] as `box_ap`, `box_ap50`, `box_ap75`, `box_ap_small`, …, `box_ar100`, … and `mask_ap`, ….
        Without a detection they are 0. A range of sizes that no object falls into has no such number (COCO's tools
        say −1), and its keys are left out.

    Raises:
        ValueError: what `read_annotations` refuses; images that are not in the file, or records of images that were
            not evaluated; no object to find.
    """
    annotations = read_annotations(annotation_file)
    image_ids = list(annotations.images) if image_ids is None else sorted(set(image_ids))
    _check_images(image_ids, annotations.images, f"{annotation_file} does not have")
    _check_images({record["image_id"] for record in records}, set(image_ids), "have detections but are not evaluated")
    truth = COCO(_ground_truth(annotations, image_ids))
    if all(is_crowd(annotation) for annotation in truth.anns.values()):
        raise ValueError(f"{annotation_file}: no object to find in the {len(image_ids)} images evaluated")
    metrics: dict[str, float] = {}
    for kind, (evaluated, key) in KINDS.items():
        # with a box beside it, a mask would be filed under the area of its box
        results = [{name: record[name] for name in ("image_id", "category_id", "score", key)} for record in records]
        evaluation = COCOeval_faster(truth, truth.loadRes(results), evaluated, print_function=logger.debug)
        evaluation.run()
        numbers = zip(NAMES, evaluation.stats[: len(NAMES)], strict=True)
        metrics |= {f"{kind}_{name}": float(number) for name, number in numbers if number >= 0}
    return metrics


def _pasted(mask: torch.Tensor, box: torch.Tensor, size: tuple[int, int]) -> dict[str, Any]:
    """A mask (1, M, M) of a box in an image of (H, W), sampled at the centres of its pixels, as a run-length code.

    torchvision's own `paste_masks_in_image` rounds the box to whole pixels, which matters for small objects.
    """
    left, top, right, bottom = box.tolist()
    rows, columns = _covered(top, bottom, size[0]), _covered(left, right, size[1])
    y = 2 * (rows + 0.5 - top) / (bottom - top) - 1  # -1 … 1 over the box
    x = 2 * (columns + 0.5 - left) / (right - left) - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (rows, columns, 2)
    pixels = np.zeros(size, dtype=np.uint8, order="F")
    if grid.numel():
        sampled = F.grid_sample(mask[None], grid[None], align_corners=False)[0, 0]  # (rows, columns)
        pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = sampled >= MASK_THRESHOLD
    code = run_length.encode(pixels)
    return {"size": list(size), "counts": code["counts"].decode("ascii")}


def _covered(start: float, end: float, length: int) -> torch.Tensor:
    """The pixels along a side of an image that a box reaches into."""
    return torch.arange(max(0, math.floor(start)), min(length, math.ceil(end)))


def _check_images(image_ids: Iterable[int], known: Iterable[int], problem: str) -> None:
    unknown = sorted(set(image_ids) - set(known))
    if unknown:
        raise ValueError(f"{len(unknown)} image(s) {problem}: ids {unknown[:5]}")


def _ground_truth(annotations: CocoAnnotations, image_ids: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """The objects of some images, with masks as run-length codes, numbered from 1: COCO's tools take 0 for none."""
    objects: list[Annotation] = []
    for image_id in image_ids:
        image = annotations.images[image_id]
        for annotation in annotations.objects[image_id]:
            truth = _truth(annotation, image["height"], image["width"])
            if truth is not None:
                objects.append(truth | {"id": len(objects) + 1})
    return {
        "images": [annotations.images[image_id] for image_id in image_ids],
        "annotations": objects,
        "categories": [{"id": number, "name": name} for number, name in annotations.class_names.items()],
    }


def _truth(annotation: Annotation, height: int, width: int) -> Annotation | None:
    try:
        mask = compressed_mask(annotation["segmentation"], height, width)
    except ValueError:
        return None
    area = annotation.get("area")
    if not isinstance(area, int | float) or not math.isfinite(area):
        area = run_length.area(mask)
    return annotation | {"segmentation": mask, "area": float(area), "iscrowd": int(is_crowd(annotation))}
