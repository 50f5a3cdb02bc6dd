"""Dense loaders: one order whatever reads it, targets that go with their images, bad rows replaced and named."""

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from mimae.data.batches.dense import DenseEvaluationLoader, DenseLoader
from mimae.data.images.decoding import BadImageError
from mimae.data.sources.dense import DenseSource

SIDE = 4


class Numbered(DenseSource):
    """Row i is an image whose pixels are i, and a mask of the same; some rows are bad."""

    def __init__(self, count: int, bad: tuple[int, ...] = (), as_objects: bool = False):
        self.name, self.fingerprint, self.class_names = "numbered", "", ["a"]
        self.block_sizes, self.bad, self.as_objects = np.array([count]), bad, as_objects

    def read(self, index):
        return b"", index

    def describe(self, index):
        return f"numbered:{index}"

    def decode(self, index, row, num_channels):
        if row[1] in self.bad:
            raise BadImageError("broken")
        image = tv_tensors.Image(torch.full((num_channels, SIDE, SIDE), row[1], dtype=torch.uint8))
        mask = tv_tensors.Mask(torch.full((SIDE, SIDE), row[1], dtype=torch.uint8))
        return image, {"labels": torch.tensor([row[1]]), "masks": mask[None]} if self.as_objects else mask


def jittered(image, target):
    return image + torch.rand(()), target


def loader_of(source: DenseSource, **options) -> DenseLoader:
    return DenseLoader(source, transform=jittered, num_channels=1, per_device_batch_size=2, **options)


def test_masks_are_stacked_and_go_with_their_images():
    batches = list(loader_of(Numbered(7)))
    assert len(batches) == 3  # the remainder is dropped
    for batch in batches:
        assert batch["pixel_values"].shape == (2, 1, SIDE, SIDE)
        assert batch["labels"].shape == (2, SIDE, SIDE)
        assert batch["labels"].dtype == torch.int64
        assert type(batch["labels"]) is torch.Tensor
        assert torch.equal(batch["pixel_values"][:, 0].floor().long(), batch["labels"])


def test_objects_stay_a_list_of_plain_tensors():
    batch = next(iter(loader_of(Numbered(4, as_objects=True))))
    assert [type(value) for target in batch["labels"] for value in target.values()] == [torch.Tensor] * 4
    assert [target["labels"].item() for target in batch["labels"]] == batch["pixel_values"][:, 0, 0, 0].int().tolist()


def test_order_and_augmentation_are_a_function_of_seed_and_epoch():
    def seen(epoch: int = 0, **options) -> torch.Tensor:
        loader = loader_of(Numbered(8), **options)
        loader.set_epoch(epoch)
        return torch.cat([batch["pixel_values"][:, 0, 0, 0] for batch in loader])

    assert torch.equal(seen(), seen(num_workers=2))
    assert not torch.equal(seen(), seen(seed=1))
    assert not torch.equal(seen(), seen(epoch=1))
    halves = [seen(num_processes=2, process_index=index) for index in range(2)]
    assert torch.equal(torch.stack(halves).unflatten(1, (-1, 2)).transpose(0, 1).flatten(), seen())


def test_a_bad_row_is_replaced_with_its_target_and_named(caplog):
    loader = loader_of(Numbered(6, bad=(2,)))
    labels = torch.cat([batch["labels"][:, 0, 0] for batch in loader])
    assert sorted(labels.tolist()) == [0, 1, 3, 3, 4, 5]
    assert loader.bad_images == ["numbered:2"]
    assert "1 image(s) could not be decoded and were replaced: ['numbered:2']" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_processes_evaluate_every_image_once_between_them(num_workers):
    source = Numbered(7, bad=(3,))
    parts = [
        DenseEvaluationLoader(
            source,
            transform=jittered,
            num_channels=1,
            num_processes=2,
            process_index=index,
            num_workers=num_workers,
        )
        for index in range(2)
    ]
    seen = [[sample.index for sample in part] for part in parts]
    assert seen == [[0, 2, 4, 6], [1, 5]]
    assert [part.bad_images for part in parts] == [[], ["numbered:3"]]


def test_more_images_in_a_batch_than_there_are_is_refused():
    with pytest.raises(ValueError, match="1 training images are fewer than one global batch of 2"):
        loader_of(Numbered(1))
