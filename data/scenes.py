"""A small data set for detection and segmentation, composed here: garments or digits in front of photographs.

    python -m mimae.data.scenes --output_dir scenes --sprites /usr/share/datasets/fashion-mnist

Each scene has a few sprites, Fashion-MNIST's garments from a folder of its IDX files or else scikit-learn's digits,
enlarged, darkened and overlapping, on a crop of the two photographs that scikit-learn ships, grey and out of focus.
Sprites, photographs and occlusion are real; positions and lighting are drawn at random. The set serves to see that
training works, and for comparisons within it: figures on it say nothing about COCO or ADE20K.

Training scenes have the sprites of the training split on the left two thirds of the photographs; other scenes have
held-out sprites, on the right third. The layout is the one that `run_semantic_segmentation.py` and
`run_object_detection.py` read:

    images/SPLIT/000000.jpg
    masks/SPLIT/000000.png                     class of each pixel, 0 = background
    annotations/instances_SPLIT.json           COCO: boxes and run-length encoded masks of the visible parts

Shapes: S side of a scene; s side of a sprite in it.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter
from scipy.ndimage import binary_fill_holes
from sklearn.datasets import load_sample_images

from .images.decoding import decode_image
from .sources.base import ImageSource
from .sources.opening import open_image_source

SPLITS = {"pretrain": 10_000, "train": 1_000, "validation": 500}
MOST_OBJECTS = 3
SPRITE_SIZES = (0.35, 0.75)  # of the scene's side
BRIGHTNESS = (0.5, 1.0)  # that a sprite is multiplied by
BACKGROUND_BLUR = 1 / 32  # of the scene's side: a small model should spend its capacity on the objects
LEAST_VISIBLE = 0.5  # part of an object that others leave uncovered
PLACES_TRIED = 10
FOREGROUND = 24  # grey value from which on a sprite's pixel belongs to the object
JPEG_QUALITY = 95


class Object(NamedTuple):
    """A sprite in a scene."""

    label: int
    visible: np.ndarray  # which pixels of it are seen: bool (S, S)
    num_pixels: int  # seen or not

    def behind(self, shape: np.ndarray) -> "Object":
        """The same with another sprite of this shape in front of it."""
        return self._replace(visible=self.visible & ~shape)

    def is_recognisable(self) -> bool:
        return self.visible.sum() >= LEAST_VISIBLE * self.num_pixels


class SceneComposer:
    """Scenes as a pure function of (seed, split, index).

    Args:
        sprites: grey images of one object each on black, with labels.
        backgrounds: RGB photographs, uint8 (H, W, 3).
        scene_size: S, pixels.
        stream: the number of the split.
    """

    def __init__(
        self, sprites: ImageSource, backgrounds: Sequence[np.ndarray], *, scene_size: int, seed: int, stream: int
    ):
        self.sprites, self.backgrounds, self.scene_size = sprites, backgrounds, scene_size
        self.seed, self.stream = seed, stream

    def __call__(self, index: int) -> tuple[np.ndarray, list[Object]]:
        """The scene, grey, uint8 (S, S), and its objects from back to front."""
        random = np.random.default_rng([self.seed, self.stream, index])
        scene = self._background(random)
        objects: list[Object] = []
        for _ in range(random.integers(1, MOST_OBJECTS + 1)):
            label, grey, silhouette = self._sprite(random)
            for _ in range(PLACES_TRIED):
                top, left = random.integers(0, self.scene_size - len(grey) + 1, size=2)
                window = np.s_[top : top + len(grey), left : left + len(grey)]
                shape = np.zeros((self.scene_size, self.scene_size), dtype=bool)
                shape[window] = silhouette
                others = [other.behind(shape) for other in objects]
                if all(other.is_recognisable() for other in others):
                    scene[window][silhouette] = grey[silhouette] * random.uniform(*BRIGHTNESS)
                    objects = [*others, Object(label, shape, int(shape.sum()))]
                    break
        return scene, objects

    def _background(self, random: np.random.Generator) -> np.ndarray:
        photograph = self.backgrounds[int(random.integers(len(self.backgrounds)))]
        height, width = photograph.shape[:2]
        largest = min(height, width)
        side = random.integers(min(self.scene_size, largest), largest + 1)
        top, left = random.integers(0, height - side + 1), random.integers(0, width - side + 1)
        crop = Image.fromarray(photograph[top : top + side, left : left + side]).convert("L")
        background = crop.resize((self.scene_size, self.scene_size), Image.Resampling.BICUBIC)
        return np.array(background.filter(ImageFilter.GaussianBlur(BACKGROUND_BLUR * self.scene_size)))

    def _sprite(self, random: np.random.Generator) -> tuple[int, np.ndarray, np.ndarray]:
        """A sprite enlarged: label, grey values uint8 (s, s), silhouette bool (s, s)."""
        encoded, label = self.sprites.read(int(random.integers(len(self.sprites))))
        grey = decode_image(encoded, num_channels=1)[0].numpy()
        silhouette = binary_fill_holes(grey >= FOREGROUND)
        side = round(self.scene_size * random.uniform(*SPRITE_SIZES))
        grey = np.array(Image.fromarray(grey).resize((side, side), Image.Resampling.BICUBIC))
        enlarged = Image.fromarray(silhouette).convert("L").resize((side, side), Image.Resampling.BILINEAR)
        return label, grey, np.array(enlarged) >= 128


def photographs(held_out: bool) -> list[np.ndarray]:
    """The part of scikit-learn's photographs that is the background of training scenes, or of held-out ones."""
    cuts = [(image, 2 * image.shape[1] // 3) for image in load_sample_images().images]
    return [image[:, cut:] if held_out else image[:, :cut] for image, cut in cuts]


def compose_split(
    composer: SceneComposer, folder: Path, split: str, num_images: int, class_names: Sequence[str] | None = None
) -> None:
    """Writes a split's images, masks and annotations; the annotations last, so that a cut-off split has none.

    Without `class_names` the sprites' labels themselves are the names.
    """
    for part in (f"images/{split}", f"masks/{split}", "annotations"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    size = composer.scene_size
    for index in range(num_images):
        scene, objects = composer(index)
        name = f"{index:06d}"
        Image.fromarray(scene).save(folder / "images" / split / f"{name}.jpg", quality=JPEG_QUALITY)
        classes = np.zeros((size, size), dtype=np.uint8)
        for each in objects:
            classes[each.visible] = each.label + 1
        Image.fromarray(classes).save(folder / "masks" / split / f"{name}.png")
        images.append({"id": index + 1, "file_name": f"{name}.jpg", "height": size, "width": size})
        annotations += coco_annotations(objects, image_id=index + 1, first_id=len(annotations) + 1)
    names = class_names or [str(label) for label in range(composer.sprites.labels().max() + 1)]
    content = {
        "info": {"description": f"{composer.sprites.name} before photographs, seed {composer.seed}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label + 1, "name": name} for label, name in enumerate(names)],
    }
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def coco_annotations(objects: Sequence[Object], image_id: int, first_id: int) -> Iterator[dict[str, Any]]:
    """The annotations of a scene's objects, as COCO has them, with masks as counts of runs."""
    for number, (label, visible, _) in enumerate(objects):
        rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
        top, left = int(rows[0]), int(columns[0])
        yield {
            "id": first_id + number,
            "image_id": image_id,
            "category_id": label + 1,
            "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
            "area": int(visible.sum()),
            "iscrowd": 0,
            "segmentation": {"size": list(visible.shape), "counts": run_lengths(visible)},
        }


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run-length code: lengths of the runs of 0, 1, 0, … down the columns, one after another."""
    values = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(values)) + 1
    lengths = np.diff(np.concatenate([[0], ends, [values.size]])).tolist()
    return [0, *lengths] if values[0] else lengths


def main(argv: Sequence[str] | None = None) -> None:
    """Composes the splits that the flags ask for.

    Raises:
        ValueError: a folder that holds a set; missing sprites; names that are not one for each class.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--sprites", help="a folder of Fashion-MNIST's IDX files; default: the embedded digits")
    parser.add_argument("--class_names", nargs="+", help="of the sprites' labels, in order; default: the numbers")
    parser.add_argument("--scene_size", type=int, default=96, help="pixels per side")
    parser.add_argument("--seed", type=int, default=0)
    for split, count in SPLITS.items():
        parser.add_argument(f"--{split}_images", type=int, default=count, help=f"default: {count}")
    flags = parser.parse_args(argv)
    # two sets in one folder would be read as one
    if used := [kind for kind in ("images", "masks", "annotations") if (flags.output_dir / kind).exists()]:
        raise ValueError(
            f"{flags.output_dir} holds {', '.join(used)} already: take another --output_dir, or remove it"
        )
    for stream, split in enumerate(SPLITS):
        held_out = split == "validation"
        sprites = open_image_source(train_dir=flags.sprites, split="test" if held_out else "train")
        if flags.class_names and len(flags.class_names) != (count := sprites.labels().max() + 1):
            raise ValueError(f"--class_names gives {len(flags.class_names)} names to {count} classes of sprites")
        composer = SceneComposer(
            sprites, photographs(held_out), scene_size=flags.scene_size, seed=flags.seed, stream=stream
        )
        num_images = getattr(flags, f"{split}_images")
        compose_split(composer, flags.output_dir, split, num_images, flags.class_names)
        print(f"{split}: {num_images} scenes")


if __name__ == "__main__":
    main()
