"""Classes by name, of images and of models; the 200 of ImageNet-A and -R; the corruptions of ImageNet-C.

An error is a fraction of images classified wrong, in [0, 1]. A relative error is in per cent of AlexNet's on the same
corruption, so that mCE, their mean, is 100 for AlexNet itself.

Shapes: B images, C channels, H × W pixels, K classes of a model, k of them that are evaluated.
"""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from ..data.sources.opening import ImageSource
from ..data.words import some

# AlexNet's top-1 errors, each the mean over five severities: Hendrycks and Dietterich, ICLR 2019 (arXiv 1903.12261).
# Names and order are those of the published folders.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
CORRUPTIONS = tuple(ALEXNET_ERRORS)
SEVERITIES = (1, 2, 3, 4, 5)
ARCHIVES = ("noise", "blur", "weather", "digital")  # what the published archives unpack to

NAMED = 10  # the most missing items that an error names


@cache
def imagenet_wnids(variant: str = "1k") -> tuple[str, ...]:
    """WordNet ids of ImageNet's classes, sorted, which is the order of labels.

    Args:
        variant: "1k" for all 1,000, "a" for the 200 of ImageNet-A (Hendrycks et al. 2021, arXiv 1907.07174), "r" for
            the 200 of ImageNet-R (Hendrycks et al. 2021, arXiv 2006.16241).
    """
    names = files(__package__).joinpath("imagenet_classes", f"imagenet_{variant}.txt")
    return tuple(names.read_text("ascii").split())


def class_positions(classes: Sequence[str], label_names: Sequence[str]) -> list[int]:
    """The positions of a set's classes among the labels of a model.

    `RestrictedClassifier(model, class_positions(imagenet_wnids("a"), label_names))` has the classes of ImageNet-A, in
    the order of that list; `class_positions(set_label_names, imagenet_wnids("a"))` gives the labels of a set of images
    in the same order, also where a class has no image.

    A label is found by its name. A model with 1,000 labels of which none is a wnid ("tench, Tinca tinca", "LABEL_0")
    is taken for one of ImageNet-1k, whose labels stand in the order of the sorted wnids.

    Args:
        classes: names of the set's classes.
        label_names: names of the model's labels, in the order of its logits.

    Returns:
        one position in `label_names` for each of `classes`.

    Raises:
        ValueError: classes that the model does not have; they are named.
    """
    wnids = imagenet_wnids()
    if len(label_names) == len(wnids) and not set(wnids) & set(label_names) and set(classes) <= set(wnids):
        label_names = wnids
    label_names = list(label_names)
    position = {name: index for index, name in enumerate(label_names)}
    if repeated := sorted({name for name in classes if label_names.count(name) > 1}):
        raise ValueError(f"the model has more than one label with the name {some(repeated)}: rename all but one")
    if missing := [name for name in classes if name not in position]:
        raise ValueError(
            f"{len(missing)} of {len(classes)} classes of the images are not among the {len(label_names)} labels "
            f"({some(label_names, 3)}): {some(missing, NAMED)}. Take images of the classes that there are, or a model "
            "that knows these; the wnids of ImageNet also fit any 1,000 labels, in their order"
        )
    return [position[name] for name in classes]


class RestrictedClassifier(nn.Module):
    """A classifier restricted to some of its classes, as ImageNet-A and -R are evaluated.

    Args:
        model: gives `logits` (B, K) for pixel_values (B, C, H, W).
        positions: of the k classes, in the order of the new logits; see `class_positions`.
    """

    def __init__(self, model: nn.Module, positions: Sequence[int]):
        super().__init__()
        self.model = model
        self.register_buffer("positions", torch.tensor(positions), persistent=False)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """Logits (B, k), and their cross entropy where there are labels (B,), in [0, k); −100 is left out."""
        logits = self.model(pixel_values).logits[:, self.positions]
        return ImageClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


def corruption_folders(root: str | os.PathLike[str]) -> dict[tuple[str, int], Path]:
    """The 75 image folders of ImageNet-C, with a folder for each class in them.

    They are `root/gaussian_noise/1` to `root/jpeg_compression/5`, with or without the folders that the published
    archives unpack to, as in `root/noise/gaussian_noise/1`. Other folders, as those of the four extra corruptions,
    are left alone. The images are 224 px already, cropped as for evaluation: read them with
    `evaluation_transform(224, crop_ratio=1)`.

    Raises:
        ValueError: `root` is not an ImageNet-C, or lacks corruptions or severities; they are named.
    """
    root = Path(root)
    expected = "expected <corruption>/<severity>/<class>/*.JPEG, as gaussian_noise/1 or noise/gaussian_noise/1"
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder, so it is no ImageNet-C: {expected}")
    parents = (*(root / archive for archive in ARCHIVES), root)  # the last one counts
    places = {name: parent / name for name in CORRUPTIONS for parent in parents if (parent / name).is_dir()}
    if not places:
        found = sorted(path.name for path in root.iterdir())
        raise ValueError(f"{root} is no ImageNet-C: {expected}, found {some(found, NAMED)}")
    folders = {(name, severity): place / str(severity) for name, place in places.items() for severity in SEVERITIES}
    lacking = [name for name in CORRUPTIONS if name not in places]
    lacking += ["/".join(map(str, key)) for key, folder in folders.items() if not any(folder.glob("*/"))]
    if lacking:
        raise ValueError(f"{root} is no whole ImageNet-C, it has no images of {some(lacking, NAMED)}: {expected}")
    return folders


def corruption_table(errors: Mapping[tuple[str, int], float], *, relative_to_alexnet: bool = False) -> dict[str, Any]:
    """Errors by corruption and severity, with their means; plain data, to be written as JSON.

    Args:
        errors: top-1 errors of any corruptions, all at the same severities.
        relative_to_alexnet: adds mCE (Hendrycks and Dietterich 2019, Sec. 4). AlexNet's errors belong to ImageNet-C,
            so it means nothing for other sets, and needs all 15 corruptions at all five severities.

    Returns:
        `severities`, a list; `per_corruption`, of each corruption its `error`, the mean over severities, and
        `error_by_severity`, a list; `mean_error` over all. With `relative_to_alexnet` also `mce`, and each
        corruption's `relative_error`.

    Raises:
        ValueError: no error, an unknown corruption, or severities that not all have; for mCE, any that is missing.
    """
    if unknown := sorted({name for name, _ in errors} - set(CORRUPTIONS)):
        raise ValueError(f"unknown corruptions {unknown}; there are {list(CORRUPTIONS)}")
    names = [name for name in CORRUPTIONS if any(name == key for key, _ in errors)]
    severities = sorted({severity for _, severity in errors})
    wanted = SEVERITIES if relative_to_alexnet else severities
    missing = [f"{name}/{severity}" for name in names for severity in wanted if (name, severity) not in errors]
    if missing or not errors:
        raise ValueError(f"no table of corruption errors without {some(missing or ['errors'], NAMED)}")
    rows = {name: [errors[name, severity] for severity in severities] for name in names}
    # statistics.mean is exact in rational arithmetic: the mean of equal numbers is that number
    per_corruption: dict[str, dict[str, Any]] = {
        name: {"error": mean(row), "error_by_severity": row} for name, row in rows.items()
    }
    table = {
        "severities": severities,
        "per_corruption": per_corruption,
        "mean_error": mean(entry["error"] for entry in per_corruption.values()),
    }
    if relative_to_alexnet:
        if absent := [name for name in CORRUPTIONS if name not in names]:
            raise ValueError(f"mCE is a mean over 15 corruptions, and {some(absent, 15)} are missing")
        for name, entry in per_corruption.items():
            entry["relative_error"] = 100 * (entry["error"] / ALEXNET_ERRORS[name])
        table["mce"] = mean(entry["relative_error"] for entry in per_corruption.values())
    return table


def corruption_markdown(table: Mapping[str, Any]) -> str:
    """A `corruption_table` in Markdown, with the means over corruptions in its last row."""
    header = ["error in %", *(f"severity {severity}" for severity in table["severities"]), "mean"]
    rows = {
        name: [100 * error for error in (*entry["error_by_severity"], entry["error"])]
        for name, entry in table["per_corruption"].items()
    }
    if "mce" in table:
        header.append("% of AlexNet's")
        for name, entry in table["per_corruption"].items():
            rows[name].append(entry["relative_error"])
    # every corruption has as many entries, so the mean of means, and mCE, are means of their columns
    means = [mean(column) for column in zip(*rows.values(), strict=True)]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    lines += [[name.replace("_", " "), *(f"{value:.1f}" for value in row)] for name, row in rows.items()]
    lines.append(["**mean**", *(f"**{value:.1f}**" for value in means)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def class_names(source: ImageSource) -> list[str]:
    """A name for each class of the images: theirs, or their numbers.

    Raises:
        ValueError: the images have no labels.
    """
    if source.label_names is not None:
        return list(source.label_names)
    return [str(label) for label in range(source.labels().max() + 1)]


def numbered(names: Sequence[str]) -> dict[str, Any]:
    """`id2label` and `label2id` of a configuration."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}


def label_map(source: ImageSource, names: Sequence[str]) -> np.ndarray:
    """The position in `names` of each label of the images: by name, or the label itself if classes have no names.

    Returns:
        int64 (classes of the images,), or (len(names),) where nothing has to be mapped.

    Raises:
        ValueError: a class that `names` does not have.
    """
    if source.label_names is not None and list(source.label_names) != list(names):
        return np.array(class_positions(source.label_names, names))
    highest = source.labels().max()
    if highest >= len(names):
        raise ValueError(
            f"{source.name} has images of label {highest}, but the labels of the model end at {len(names) - 1}"
        )
    return np.arange(len(names))
