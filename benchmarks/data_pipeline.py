"""From bytes in memory to a batch, beside the official pipeline and the transformers example's; then loader and step.

Shapes: B images of a batch, h = w the model's image size.

Images per second are those of one core: one thread, no worker, and the processor's time that it takes. The peers are
restated here from what they compose:

- official MAE (facebookresearch/mae, `main_pretrain.py`): Pillow, torchvision's v1 transforms, float32;
- transformers (`examples/pytorch/image-pretraining/run_mae.py`): the same transforms, after reading an `Image` column
  of a 🤗 data set;
- bare: torchvision's decoder and v2 transforms on uint8, neither seeded nor with noise; the ceiling of our route.
"""

import contextlib
import io
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from mimae.data.batches.randomness import seed_torch
from mimae.data.images.decoding import decode_image
from mimae.data.images.transforms import IMAGENET_MEAN, IMAGENET_STD, pretraining_transform
from mimae.data.order import augmentation_seed, sample_noise

from .data_steps import PATCH_SIZES, loader_over, measure_steps, number_of_workers
from .measurement import Bar, Measurement, Table
from .measuring import ratio, take_turns
from .photographs import FEATURES, HEIGHT, WIDTH, EncodedSource, encode, jpegs

OURS, OFFICIAL, TRANSFORMERS, BARE = "mimae", "official MAE", "transformers example", "bare torchvision"
QUALITIES = (96, 90)
WHOLE = "all, bytes to batch"
CPU = torch.device("cpu")
SCALE = (0.2, 1.0)  # of the crop's area


def measure(device: torch.device, *, quick: bool) -> Measurement:
    """Images per second and core, where the time goes, and what of it a training step feels."""
    image_sizes, count, rounds = ([32], 4, 1) if quick else (list(PATCH_SIZES), 96, 11)
    with one_thread():
        pipelines, over_official = measure_pipelines(image_sizes, count, rounds)
        parts = measure_parts(count, rounds)
        end_to_end, waited, of_synthetic = measure_steps(device, quick=quick)
    workers = number_of_workers(device)
    return Measurement(
        f"JPEGs of {WIDTH} x {HEIGHT} pixels, crops of real photographs. Images per second of one core's time.",
        [pipelines, parts, end_to_end],
        [
            Bar(
                "Data: images per second and core, 224 px, of the official pipeline's",
                2.0,
                over_official,
                note="quality 96, seeding and mask noise included",
            ),
            Bar(
                f"Data: time that the step waits on {device.type}",
                3.0,
                100 * waited,
                "%",
                at_most=True,
                note=f"the worst of memory, folder and stream; workers: {workers}",
            ),
            Bar(
                "MI-MAE N = 4 on real JPEGs, of synthetic, on a GPU",
                97.0,
                100 * of_synthetic if device.type == "cuda" else None,
                "%",
                note="ViT-base 224, bf16; the worst of memory, folder and stream",
            ),
        ],
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """What is computed on the CPU is computed by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure_pipelines(image_sizes: list[int], count: int, rounds: int) -> tuple[Table, float]:
    """Every pipeline at every size and quality, and our ratio to the official one at the first of each."""
    encoded = {quality: jpegs(count, quality) for quality in QUALITIES}
    rows, over_official = [], []
    for image_size, quality in itertools.product(image_sizes, QUALITIES):
        pipelines = pipelines_over(encoded[quality], image_size)
        seconds = take_turns(pipelines, rounds=rounds, warm_up=1, device=CPU, clock=time.process_time)
        rates = [count / statistics.median(each) for each in seconds.values()]
        over_official.append(ratio(seconds, OFFICIAL, OURS))
        over_others = [ratio(seconds, other, OURS) for other in (TRANSFORMERS, BARE)]
        rows.append([f"{image_size} px, quality {quality}", *rates, over_official[-1], *over_others])
    over = [f"over {name}" for name in (OFFICIAL, TRANSFORMERS, BARE)]
    note = "Ours gives uint8, which the device normalises; the two peers give normalised float32, four times as large."
    return Table("Images per second and core", ("images", *pipelines, *over), rows, note), over_official[0]


def pipelines_over(encoded: list[bytes], image_size: int) -> dict[str, Callable[[], Any]]:
    """By name, what makes one batch of all the images."""
    batches = loader_over(EncodedSource(encoded), image_size, len(encoded)).batches()
    return {
        OURS: partial(next, batches),
        OFFICIAL: partial(official_batch, encoded, peers_transform(image_size)),
        TRANSFORMERS: partial(example_batch, example_dataset(encoded, image_size)),
        BARE: partial(bare_batch, encoded, pretraining_transform(image_size)),
    }


def peers_transform(image_size: int) -> v1.Compose:
    """A Pillow image to float32 (3, h, w), as both peers have it."""
    return v1.Compose(
        [
            v1.RandomResizedCrop(image_size, scale=SCALE, interpolation=v1.InterpolationMode.BICUBIC),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            v1.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def official_batch(encoded: list[bytes], transform: v1.Compose) -> torch.Tensor:
    """float32 (B, 3, h, w)."""
    return torch.stack([transform(Image.open(io.BytesIO(image)).convert("RGB")) for image in encoded])


def example_dataset(encoded: list[bytes], image_size: int) -> Dataset:
    """A 🤗 data set in memory that transforms what is read of it."""
    transform = v1.Compose([v1.Lambda(lambda image: image.convert("RGB")), peers_transform(image_size)])
    dataset = Dataset.from_dict({"image": [{"bytes": image, "path": None} for image in encoded]}, features=FEATURES)
    return dataset.with_transform(lambda rows: {"pixel_values": [transform(image) for image in rows["image"]]})


def example_batch(dataset: Dataset) -> torch.Tensor:
    """float32 (B, 3, h, w)."""
    return torch.stack([row["pixel_values"] for row in dataset.__getitems__(list(range(len(dataset))))])


def bare_batch(encoded: list[bytes], transform: torch.nn.Module) -> torch.Tensor:
    """uint8 (B, 3, h, w)."""
    data = (torch.frombuffer(bytearray(image), dtype=torch.uint8) for image in encoded)
    return torch.stack([transform(decode_jpeg(each, mode=ImageReadMode.RGB)) for each in data])


def measure_parts(count: int, rounds: int) -> Table:
    """What each part of our way takes, in a loop of its own, at 224 px and quality 96."""
    encoded = jpegs(count, QUALITIES[0])
    images = [decode_image(each, 3) for each in encoded]
    pipeline: Any = pretraining_transform(224)
    crop, flip = pipeline.transforms
    places = [crop.make_params([image]) for image in images]
    crops = (v2.functional.crop(image, **place) for image, place in zip(images, places, strict=True))
    cut = [encode(v2.functional.to_pil_image(each), QUALITIES[0]) for each in crops]
    views = [crop(image) for image in images]
    loader = loader_over(EncodedSource(encoded), 224, count)
    shape = loader.sample_options["noise_shape"]
    parts: dict[str, Callable[[], object]] = {
        "decode": lambda: [decode_image(each, 3) for each in encoded],
        "crop and resize": lambda: [crop(image) for image in images],
        "flip": lambda: [flip(view) for view in views],
        "seed": lambda: list(map(seed_torch, [augmentation_seed(0, 0, index) for index in range(count)])),
        "noise": lambda: [sample_noise(0, 0, index, shape) for index in range(count)],
        "stack": lambda: torch.stack(views),
        WHOLE: partial(next, loader.batches()),
        "decode, of files that hold the crop alone": lambda: [decode_image(each, 3) for each in cut],
    }
    seconds = take_turns(parts, rounds=rounds, warm_up=1, device=CPU, clock=time.process_time)
    rows = [
        [part, 1e6 * statistics.median(each) / count, 100 / ratio(seconds, WHOLE, part)]
        for part, each in seconds.items()
    ]
    note = (
        "In loops of their own parts find their code and data in the cache, between two decodes less so: they sum to "
        "less than the whole. The last row bounds what a decoder of the crop alone would gain; it could not reach it, "
        "as it has to read the code before the crop. torchvision and Pillow offer none, so it would cost a dependency "
        "of its own; Pillow's `draft` decodes at a half or less, and gains nothing at this size."
    )
    return Table("Where the time goes, 224 px, quality 96", ("part", "µs per image", "% of the whole"), rows, note)
