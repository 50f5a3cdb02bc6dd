"""Objects in images: annotation files in COCO's format, and a folder of images.

Shapes: C channels, H, W an image's height and width, n objects in it, K classes.

A fault of the file itself is an error when it is opened. A faulty object is left out, of training and of evaluation
alike, and a warning counts such objects by reason; a mask without a pixel, which is noticed only when it is
rasterised, is left out of training alone, as COCO's evaluation counts it. A faulty image is a `BadImageError`, for
which a loader takes another image.
"""

import hashlib
import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as run_length
from torchvision import tv_tensors

from ..images.decoding import BadImageError, decode_image
from ..words import some
from .dense import DenseSource

logger = logging.getLogger(__name__)

Annotation = dict[str, Any]

REQUIRED_KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox", "segmentation"),
}
USED_KEYS = ("id", "category_id", "bbox", "segmentation")  # of an annotation, in training

NOT_FOUR_NUMBERS = "a box that is not four finite numbers"
NO_AREA = "a box without area"
BOX_OUTSIDE = "a box outside the image"
NO_MASK = "a segmentation that is neither polygons nor a run-length code"
TOO_FEW_POINTS = "a polygon of fewer than three points"
ODD_COORDINATES = "a polygon with an odd number of coordinates"
FAR_POINTS = "a polygon with points far outside the image, or that are no numbers"
OTHER_SIZE = "a run-length code of another size than the image"
DAMAGED_CODE = "a damaged run-length code"
EMPTY_MASK = "a mask without a pixel"


@dataclass(frozen=True)
class CocoAnnotations:
    """What an annotation file says."""

    images: dict[int, dict[str, Any]]  # by id, in the order of the file; each has `file_name`, `height` and `width`
    class_names: dict[int, str]  # by category id, ascending
    objects: dict[int, list[Annotation]]  # by image id, as in the file, crowds too, without those in `left_out`
    left_out: dict[str, list[int]]  # ids of the annotations that cannot be used, by what is wrong with them


def read_annotations(path: str | os.PathLike[str]) -> CocoAnnotations:
    """Reads and checks an annotation file, without rasterising a mask.

    Raises:
        ValueError: no such file; not JSON, or cut off; a key is missing, or an id is repeated or not an integer; a
            size is not positive; an annotation names an image or category that the file does not have.
    """
    content = _parse(path)
    images, categories, annotations = (_by_id(content, section, path) for section in REQUIRED_KEYS)
    for image_id, image in images.items():
        if not all(type(image[side]) is int and image[side] > 0 for side in ("height", "width")):
            raise ValueError(
                f"{path}: image {image_id} has height {image['height']!r} and width {image['width']!r}; "
                "both must be whole numbers of pixels, above 0"
            )
    objects: dict[int, list[Annotation]] = {image_id: [] for image_id in images}
    left_out: dict[str, list[int]] = defaultdict(list)
    for annotation_id, annotation in annotations.items():
        for key, known in (("image_id", images), ("category_id", categories)):
            if annotation[key] not in known:
                raise ValueError(
                    f"{path}: annotation {annotation_id} has {key} {annotation[key]!r}, which the file does not list; "
                    "add it there, or remove the annotation"
                )
        image = images[annotation["image_id"]]
        size = image["height"], image["width"]
        if fault := _box_fault(annotation["bbox"], *size) or _mask_fault(annotation["segmentation"], *size):
            left_out[fault].append(annotation_id)
        else:
            objects[annotation["image_id"]].append(annotation)
    names = {category_id: str(categories[category_id]["name"]) for category_id in sorted(categories)}
    return CocoAnnotations(images, names, objects, dict(left_out))


def is_crowd(annotation: Annotation) -> bool:
    """Whether it marks a region of uncounted objects, in which evaluation ignores detections."""
    return annotation.get("iscrowd", 0) in (1, "1")


def compressed_mask(segmentation: list[Any] | dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """COCO's compressed run-length code of a segmentation in any of its three forms.

    Args:
        segmentation: polygons [[x, y, x, y, …], …] or a run-length code that `read_annotations` has accepted.

    Raises:
        ValueError: a compressed code that is damaged.
    """
    if isinstance(segmentation, list):
        return run_length.merge(run_length.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return run_length.frPyObjects(segmentation, height, width)
    try:
        run_length.decode(segmentation)
    except (RuntimeError, ValueError) as error:
        raise ValueError(DAMAGED_CODE) from error
    return segmentation


class CocoSource(DenseSource):
    """Images with their objects.

    A row is (encoded image, annotations as the file has them, without crowds). They are kept as JSON text: as Python
    objects, COCO's 860,000 would need gigabytes, and again in every worker.

    Args:
        path: of the annotations, JSON in the format of COCO's `instances_*.json`.
        image_dir: the folder that its `file_name`s start from.
        keep_empty: whether images without a usable object belong to the source, as evaluation needs them. detectron2
            trains without them.

    Attributes:
        image_ids: int64 (images,), the file's ids of the rows.
        category_ids: the file's ids of the K classes, ascending: to map labels back.
        num_objects: of all images, as far as can be told without rasterising masks.

    Raises:
        ValueError: what `read_annotations` refuses; images that are not in the folder; no image is left.
    """

    def __init__(self, path: str | os.PathLike[str], image_dir: str | os.PathLike[str], *, keep_empty: bool):
        annotations = read_annotations(path)
        objects = {
            image_id: [annotation for annotation in found if not is_crowd(annotation)]
            for image_id, found in annotations.objects.items()
        }
        images = {image_id: image for image_id, image in annotations.images.items() if keep_empty or objects[image_id]}
        if not images:
            raise ValueError(f"{path} has no image{'' if keep_empty else ' with an object that can be used'}")
        self.num_objects = sum(map(len, objects.values()))
        self.name, self.image_dir = str(path), Path(image_dir)
        self.category_ids, self.class_names = list(annotations.class_names), list(annotations.class_names.values())
        self.image_ids = np.array(list(images), dtype=np.int64)
        self.block_sizes = np.array([len(images)], dtype=np.int64)
        self._names = [image["file_name"] for image in images.values()]
        self._sizes = np.array([(image["height"], image["width"]) for image in images.values()])  # (images, 2)
        packed = [
            json.dumps([{key: annotation[key] for key in USED_KEYS} for annotation in objects[image_id]]).encode()
            for image_id in images
        ]
        self._packed, self._ends = b"".join(packed), np.cumsum([len(text) for text in packed])
        self.fingerprint = hashlib.sha256(self._packed + self.image_ids.tobytes()).hexdigest()
        self._has_warned = False
        _check_files(self.image_dir, self._names, path)
        if annotations.left_out:
            logger.warning("%s: left out %s", path, _counted(annotations.left_out))

    def read(self, index: int) -> tuple[bytes, list[Annotation]]:
        start = self._ends[index - 1] if index else 0
        return Path(self.describe(index)).read_bytes(), json.loads(self._packed[start : self._ends[index]])

    def decode(
        self, index: int, row: tuple[bytes, list[Annotation]], num_channels: int
    ) -> tuple[tv_tensors.Image, dict[str, Any]]:
        """Decodes a row.

        Returns:
            The image, uint8 (C, H, W), and a dict of its objects: `boxes`, float32 (n, 4), left, top, right and
            bottom edge in pixels, clipped to the image; `labels`, int64 (n,), 0..K-1; `masks`, uint8 (n, H, W);
            and `image_id`, the file's.

        Raises:
            BadImageError: the image cannot be decoded, or has another size than the file of annotations says. As in
                detectron2, it is turned as its EXIF block says before it is measured.
        """
        encoded, annotations = row
        height, width = self._sizes[index].tolist()
        image = decode_image(encoded, num_channels)  # (C, H, W)
        if image.shape[-2:] != (height, width):
            raise BadImageError(
                f"the image has {image.shape[-2]} x {image.shape[-1]} pixels, "
                f"its annotations are for {height} x {width} (height x width)"
            )
        drawn = [(annotation, self._mask(annotation, height, width)) for annotation in annotations]
        kept = [annotation for annotation, mask in drawn if mask is not None]
        masks = [mask for _, mask in drawn if mask is not None]
        boxes = torch.tensor([annotation["bbox"] for annotation in kept], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # left, top, width, height -> left, top, right, bottom
        boxes = boxes.clamp(min=torch.zeros(4), max=torch.tensor([width, height, width, height]))
        labels = [self.category_ids.index(annotation["category_id"]) for annotation in kept]
        return tv_tensors.Image(image), {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": tv_tensors.Mask(torch.from_numpy(np.array(masks, dtype=np.uint8).reshape(-1, height, width))),
            "image_id": int(self.image_ids[index]),
        }

    def describe(self, index: int) -> str:
        return str(self.image_dir / self._names[index])

    def _mask(self, annotation: Annotation, height: int, width: int) -> np.ndarray | None:
        """Its pixels, uint8 (H, W), or None, with one warning per process, if there are none."""
        try:
            mask = run_length.decode(compressed_mask(annotation["segmentation"], height, width))
            if mask.any():
                return mask
            fault = EMPTY_MASK
        except ValueError as error:
            fault = str(error)
        if not self._has_warned:
            logger.warning(
                f"{self.name}: left out annotation {annotation['id']}: {fault}. Others that only drawing their masks "
                "shows to be unusable are left out without a word"
            )
            self._has_warned = True
        return None


def _parse(path: str | os.PathLike[str]) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"there is no annotation file {path}")
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, or cut off ({error}): fetch the file again") from error
    for section in REQUIRED_KEYS:
        if not isinstance(content, dict) or not isinstance(content.get(section), list):
            raise ValueError(f"{path} has no list {section!r}: it is no file of COCO's object annotations")
    return content


def _by_id(content: dict[str, Any], section: str, path: str | os.PathLike[str]) -> dict[int, dict[str, Any]]:
    entries: dict[int, dict[str, Any]] = {}
    for position, entry in enumerate(content[section]):
        missing = [key for key in REQUIRED_KEYS[section] if not isinstance(entry, dict) or key not in entry]
        if missing:
            hint = ": boxes alone will not do, Mask R-CNN learns from masks" if missing == ["segmentation"] else ""
            name = f"position {position}" if "id" in missing else f"id {entry['id']}"
            raise ValueError(f"{path}: the entry of {section!r} with {name} lacks {some(missing)}{hint}")
        if type(entry["id"]) is not int:
            raise ValueError(f"{path}: the id {entry['id']!r} in {section!r} is not a whole number")
        if entry["id"] in entries:
            raise ValueError(f"{path}: the id {entry['id']} stands twice in {section!r}; ids must differ")
        entries[entry["id"]] = entry
    return entries


def _box_fault(box: Any, height: int, width: int) -> str | None:
    if not isinstance(box, list) or len(box) != 4 or not _all_finite(box):
        return NOT_FOUR_NUMBERS
    left, top, box_width, box_height = box
    if box_width <= 0 or box_height <= 0:
        return NO_AREA
    if left >= width or top >= height or left + box_width <= 0 or top + box_height <= 0:
        return BOX_OUTSIDE
    return None


def _mask_fault(segmentation: Any, height: int, width: int) -> str | None:
    """What is wrong with a mask, as far as can be told without rasterising it."""
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), list | str):
        return _code_fault(segmentation, height, width)
    if not isinstance(segmentation, list) or not segmentation or not all(isinstance(p, list) for p in segmentation):
        return NO_MASK
    return next(filter(None, (_polygon_fault(polygon, height, width) for polygon in segmentation)), None)


def _polygon_fault(polygon: list[Any], height: int, width: int) -> str | None:
    if len(polygon) % 2:
        return ODD_COORDINATES
    if len(polygon) < 6:
        return TOO_FEW_POINTS
    reach = max(height, width)  # drawing an edge takes time and memory in proportion to its length
    if not _all_finite(polygon) or min(polygon) < -reach or max(polygon) > 2 * reach:
        return FAR_POINTS
    return None


def _code_fault(code: dict[str, Any], height: int, width: int) -> str | None:
    if code.get("size") != [height, width]:
        return OTHER_SIZE
    counts = code["counts"]
    if isinstance(counts, str):  # whether it is sound is seen when it is rasterised
        return None
    if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != height * width:
        return DAMAGED_CODE
    return None


def _all_finite(values: Sequence[Any]) -> bool:
    try:
        return all(map(math.isfinite, values))
    except (TypeError, OverflowError):  # no number, or a whole one beyond all floats
        return False


def _check_files(image_dir: Path, names: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Lists each folder once instead of looking for each of 100,000 files, which is slow on a network drive."""
    if not image_dir.is_dir():
        raise ValueError(f"the image folder {image_dir} is not a folder")
    parents = {(image_dir / name).parent for name in names}
    present = {path for parent in parents if parent.is_dir() for path in parent.iterdir()}
    if missing := [name for name in names if image_dir / name not in present]:
        raise ValueError(
            f"{len(missing)} of the {len(names)} images of {path} are not in {image_dir}: {some(missing)}; "
            "name the folder that the file names start from, or fetch the images"
        )


def _counted(left_out: dict[str, list[int]]) -> str:
    """Reads as "2 annotations with a box without area (7, 9); 1 …"."""
    counts = {fault: f"{len(ids)} annotation{'s' if len(ids) > 1 else ''}" for fault, ids in left_out.items()}
    return "; ".join(f"{counts[fault]} with {fault} ({some(ids)})" for fault, ids in left_out.items())
