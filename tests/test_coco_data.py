"""COCO's annotations become boxes, labels and masks; what is wrong with them is told; jitter keeps them together."""

import copy
import json
import logging
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_helpers import encode
from PIL import Image
from pycocotools import mask as pycocotools_mask
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from mimae.data import scenes
from mimae.data.batches.dense import DenseEvaluationLoader, DenseLoader
from mimae.data.images.decoding import BadImageError
from mimae.data.images.detection_augmentation import detection_evaluation_transform, large_scale_jitter
from mimae.data.sources import coco
from mimae.data.sources.coco import CocoSource

HEIGHT, WIDTH = 20, 30
SQUARE = [[4, 5, 10, 5, 10, 11, 4, 11]]
NORMALIZATION = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """Eight scenes of digits: the annotation file and the folder of its images."""
    folder = tmp_path_factory.mktemp("scenes")
    counts = ["--pretrain_images", "0", "--train_images", "8", "--validation_images", "0"]
    scenes.main(["--output_dir", str(folder), "--scene_size", "64", *counts])
    return folder / "annotations" / "instances_train.json", folder / "images" / "train"


def annotation(number, **changes):
    plain = {"id": number, "image_id": 1, "category_id": 3, "bbox": [4, 5, 6, 6], "area": 36, "iscrowd": 0}
    return plain | {"segmentation": SQUARE} | changes


def content(*annotations):
    return {
        "images": [
            {"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH} for number in (1, 2)
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": list(annotations),
    }


def write(folder, data):
    for number in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT), "gray").save(folder / f"{number}.png")
    path = folder / "instances.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def opened(folder, *annotations, keep_empty=True):
    return CocoSource(write(folder, content(*annotations)), folder, keep_empty=keep_empty)


def decoded(source, index=0):
    return source.decode(index, source.read(index), 3)


def code_of(mask):
    code = pycocotools_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": code["counts"].decode()}


def test_a_row_is_an_image_with_boxes_labels_and_masks(tmp_path):
    image, target = decoded(opened(tmp_path, annotation(1), annotation(2, category_id=7, bbox=[20, 0, 10.5, 3])))
    assert isinstance(image, tv_tensors.Image)
    assert (image.dtype, image.shape) == (torch.uint8, (3, HEIGHT, WIDTH))
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
    assert target["boxes"].canvas_size == (HEIGHT, WIDTH)
    assert target["boxes"].tolist() == [[4, 5, 10, 11], [20, 0, 30, 3]]  # the second is clipped
    assert target["labels"].tolist() == [0, 1]  # by ascending category id, not in the order of the file
    assert isinstance(target["masks"], tv_tensors.Mask)
    assert target["masks"].dtype == torch.uint8
    assert target["masks"][0].nonzero().tolist() == [[y, x] for y in range(5, 11) for x in range(4, 10)]
    assert target["image_id"] == 1


def test_labels_lead_back_to_category_ids(tmp_path):
    source = opened(tmp_path, annotation(1))
    assert (source.category_ids, source.class_names) == ([3, 7], ["dog", "cat"])
    assert source.image_ids.tolist() == [1, 2]
    assert source.describe(1) == str(tmp_path / "2.png")


def test_all_three_codes_are_drawn_as_pycocotools_draws_them(tmp_path):
    random = np.random.default_rng(0)
    polygons = [[random.uniform(-3, 33, 2 * points).round(2).tolist() for points in (3, 5, 8)] for _ in range(10)]
    blob = random.random((HEIGHT, WIDTH)) < 0.3
    codes = [*polygons, code_of(blob), {"size": [HEIGHT, WIDTH], "counts": scenes.run_lengths(blob)}]
    source = opened(tmp_path, *(annotation(number, segmentation=code) for number, code in enumerate(codes)))
    masks = decoded(source)[1]["masks"].numpy()
    assert len(masks) == len(codes)
    for mask, polygon in zip(masks, polygons, strict=False):
        expected = pycocotools_mask.merge(pycocotools_mask.frPyObjects(polygon, HEIGHT, WIDTH))
        assert np.array_equal(mask, pycocotools_mask.decode(expected))
    assert np.array_equal(masks[-2], blob)
    assert np.array_equal(masks[-1], blob)


def test_a_polygon_of_four_numbers_is_not_taken_for_a_box(tmp_path):
    # the tools of COCO would draw it as one
    assert len(decoded(opened(tmp_path, annotation(1, segmentation=[[4, 5, 6, 6]])))[1]["masks"]) == 0


def test_composed_scenes_decode_to_boxes_tight_around_their_masks(composed):
    source = CocoSource(*composed, keep_empty=False)
    for index in range(len(source)):
        target = decoded(source, index)[1]
        assert torch.equal(torch.as_tensor(target["boxes"])[:, :2], masks_to_boxes(target["masks"])[:, :2])
        assert torch.equal(torch.as_tensor(target["boxes"])[:, 2:], masks_to_boxes(target["masks"])[:, 2:] + 1)


def test_a_pickled_source_reads_the_same(composed):
    source = CocoSource(*composed, keep_empty=True)
    copied = pickle.loads(pickle.dumps(source))
    assert [copied.read(index) for index in range(8)] == [source.read(index) for index in range(8)]
    assert copied.fingerprint == source.fingerprint


def test_images_without_objects_are_left_out_or_have_empty_targets(tmp_path):
    only_crowd = annotation(2, image_id=2, iscrowd=1)
    assert opened(tmp_path, annotation(1), only_crowd, keep_empty=False).image_ids.tolist() == [1]
    target = decoded(opened(tmp_path, annotation(1), only_crowd), index=1)[1]
    assert target["boxes"].shape == (0, 4)
    assert target["boxes"].dtype == torch.float32
    assert (target["labels"].shape, target["labels"].dtype) == ((0,), torch.int64)
    assert (target["masks"].shape, target["masks"].dtype) == ((0, HEIGHT, WIDTH), torch.uint8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bbox": [4, 5, 0, 6]}, coco.NO_AREA),
        ({"bbox": [4, 5, 6, -6]}, coco.NO_AREA),
        ({"bbox": [4, 5, 6]}, coco.NOT_FOUR_NUMBERS),
        ({"bbox": [4, 5, 6, float("nan")]}, coco.NOT_FOUR_NUMBERS),
        ({"bbox": [4, 5, "6", 6]}, coco.NOT_FOUR_NUMBERS),
        ({"bbox": None}, coco.NOT_FOUR_NUMBERS),
        ({"bbox": [WIDTH, 5, 6, 6]}, coco.BOX_OUTSIDE),
        ({"segmentation": []}, coco.NO_MASK),
        ({"segmentation": None}, coco.NO_MASK),
        ({"segmentation": {"size": [HEIGHT, WIDTH]}}, coco.NO_MASK),
        ({"segmentation": [4, 5, 10, 5, 10, 11]}, coco.NO_MASK),
        ({"segmentation": [[4, 5, 10, 5]]}, coco.TOO_FEW_POINTS),
        ({"segmentation": [*SQUARE, []]}, coco.TOO_FEW_POINTS),
        ({"segmentation": [[4, 5, 10, 5, 10, 11, 4]]}, coco.ODD_COORDINATES),
        ({"segmentation": [[4, 5, 1e30, 5, 10, 11]]}, coco.FAR_POINTS),
        ({"segmentation": [[4, 5, float("nan"), 5, 10, 11]]}, coco.FAR_POINTS),
        ({"segmentation": {"size": [WIDTH, HEIGHT], "counts": [600]}}, coco.OTHER_SIZE),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 599]}}, coco.DAMAGED_CODE),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 601, -1]}}, coco.DAMAGED_CODE),
    ],
)
def test_an_unusable_annotation_is_left_out_and_the_opening_says_so(tmp_path, caplog, change, reason):
    source = opened(tmp_path, annotation(11), annotation(12, **change), annotation(13, **change))
    assert len(caplog.records) == 1
    assert f"2 annotations with {reason} (12, 13)" in caplog.text
    assert len(decoded(source)[1]["boxes"]) == 1


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ({"size": [HEIGHT, WIDTH], "counts": "~~~~"}, coco.DAMAGED_CODE),
        ({"size": [HEIGHT, WIDTH], "counts": "34lll```"}, coco.DAMAGED_CODE),
        ({"size": [HEIGHT, WIDTH], "counts": ""}, coco.DAMAGED_CODE),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}, coco.EMPTY_MASK),
        ([[4.1, 5.1, 4.2, 5.1, 4.2, 5.2]], coco.EMPTY_MASK),
    ],
)
def test_what_only_drawing_shows_to_be_unusable_is_left_out_then_with_one_warning(
    tmp_path, caplog, segmentation, reason
):
    source = opened(tmp_path, annotation(11), annotation(12, segmentation=segmentation))
    assert not caplog.records
    assert [len(decoded(source)[1][key]) for key in ("boxes", "labels", "masks")] == [1, 1, 1]
    assert len(decoded(source)[1]["boxes"]) == 1
    assert len(caplog.records) == 1
    assert f"left out annotation 12: {reason}" in caplog.text


def without(section, key):
    broken = content(annotation(8))
    del broken[section][-1][key]
    return broken


def twice(section):
    broken = content(annotation(8))
    broken[section].append(copy.deepcopy(broken[section][0]))
    return broken


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"images": [', "not JSON, or cut off"),
        ("[]", "no list 'images'"),
        ({"images": [], "categories": []}, "no list 'annotations'"),
        ({"images": [3], "categories": [], "annotations": []}, "position 0 lacks id"),
        ({"images": [], "categories": [], "annotations": []}, "has no image"),
        (without("images", "file_name"), "'images' with id 2 lacks file_name"),
        (without("annotations", "bbox"), "'annotations' with id 8 lacks bbox"),
        (without("annotations", "segmentation"), "lacks segmentation: boxes alone will not do"),
        (twice("images"), "id 1 stands twice in 'images'"),
        (twice("categories"), "id 7 stands twice in 'categories'"),
        (twice("annotations"), "id 8 stands twice in 'annotations'"),
        (content(annotation("8")), "id '8' in 'annotations' is not a whole number"),
        (content(annotation(8, image_id=5)), "annotation 8 has image_id 5.*add it there, or remove"),
        (content(annotation(8, category_id=5)), "annotation 8 has category_id 5.*add it there, or remove"),
    ],
)
def test_a_broken_file_is_refused_with_what_is_wrong(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        CocoSource(write(tmp_path, data), tmp_path, keep_empty=True)


def test_sizes_must_be_pixels(tmp_path):
    broken = content(annotation(1))
    broken["images"][1]["height"] = 0
    with pytest.raises(ValueError, match="image 2 has height 0"):
        CocoSource(write(tmp_path, broken), tmp_path, keep_empty=True)


def test_missing_files_are_told_at_opening(tmp_path):
    path = write(tmp_path, content(annotation(1)))
    with pytest.raises(ValueError, match="there is no annotation file"):
        CocoSource(tmp_path / "none.json", tmp_path, keep_empty=True)
    with pytest.raises(ValueError, match="not a folder"):
        CocoSource(path, tmp_path / "none", keep_empty=True)
    (tmp_path / "2.png").unlink()
    with pytest.raises(ValueError, match=r"1 of the 2 images .*: 2\.png; name the folder"):
        CocoSource(path, tmp_path, keep_empty=True)
    CocoSource(path, tmp_path, keep_empty=False)  # the missing one has no object
    with pytest.raises(ValueError, match="no image with an object"):
        opened(tmp_path, annotation(1, iscrowd=1), keep_empty=False)


def test_images_may_lie_in_folders_that_the_file_names(tmp_path):
    nested = content(annotation(1))
    nested["images"][1]["file_name"] = "deep/er/2.png"
    path = write(tmp_path, nested)
    with pytest.raises(ValueError, match=r"deep/er/2\.png"):
        CocoSource(path, tmp_path, keep_empty=True)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "2.png").rename(tmp_path / "deep" / "er" / "2.png")
    assert CocoSource(path, tmp_path, keep_empty=True).read(1)[1] == []


def test_an_image_that_is_damaged_or_of_another_size_is_a_bad_image(tmp_path):
    source = opened(tmp_path, annotation(1))
    other, turned = encode(Image.new("RGB", (HEIGHT, WIDTH)), "PNG"), Image.new("RGB", (WIDTH, HEIGHT))
    with pytest.raises(BadImageError, match="30 x 20 pixels, its annotations are for 20 x 30"):
        source.decode(0, (other, []), 3)
    exif = turned.getexif()
    exif[0x0112] = 6  # stored lying, shown standing
    with pytest.raises(BadImageError, match="30 x 20 pixels"):
        source.decode(0, (encode(turned, exif=exif), []), 3)
    with pytest.raises(BadImageError):
        source.decode(0, (other[:40], []), 3)


def made_image(height, width, *boxes):
    """An image whose red channel is 255 where an object is, and its target: filled rectangles."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0] = 255 * masks.amax(0) if boxes else 0
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return tv_tensors.Image(image), {
        "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width)),
        "labels": torch.arange(len(boxes)),
        "masks": tv_tensors.Mask(masks),
        "image_id": 1,
    }


def test_jitter_of_scale_one_resizes_to_fit_and_pads_with_zeros_after_normalisation():
    transform = large_scale_jitter(40, **NORMALIZATION, scale_range=(1, 1), horizontal_flip=0)
    pixels, target = transform(*made_image(10, 20, (2, 3, 8, 9)))
    assert (pixels.dtype, pixels.shape) == (torch.float32, (3, 40, 40))
    assert target["boxes"].tolist() == [[4, 6, 16, 18]]
    assert target["masks"].shape == (1, 40, 40)
    assert target["masks"][0].nonzero().aminmax(dim=0).min.tolist() == [6, 4]
    assert target["masks"].sum() == 12 * 12
    assert (pixels[:, 20:] == 0).all()
    torch.testing.assert_close(pixels[:, 0, 39], -torch.tensor([0.5, 0.4, 0.3]) / torch.tensor([0.2, 0.25, 0.3]))
    torch.testing.assert_close(pixels[0, 12, 10], torch.tensor((1 - 0.5) / 0.2))


def test_a_flip_mirrors_image_boxes_and_masks():
    transform = large_scale_jitter(20, **NORMALIZATION, scale_range=(1, 1), horizontal_flip=1)
    pixels, target = transform(*made_image(10, 20, (2, 3, 8, 9)))
    assert target["boxes"].tolist() == [[12, 3, 18, 9]]
    assert (pixels[0] > 0).nonzero().tolist() == target["masks"][0].nonzero().tolist()


@pytest.mark.parametrize("size", [(30, 50), (50, 30), (7, 90), (200, 120)])
def test_jittered_boxes_stay_around_their_masks_and_their_pixels(size):
    height, width = size
    boxes = [(1, 1, width // 3, height // 3), (2 * width // 3, 2 * height // 3, width - 1, height - 1)]
    image, target = made_image(height, width, *boxes)
    transform = large_scale_jitter(64, **NORMALIZATION)
    counts = []
    for _ in range(40):
        pixels, jittered = transform(image, target)
        assert pixels.shape == (3, 64, 64)
        corners = torch.as_tensor(jittered["boxes"])
        assert ((corners >= 0) & (corners <= 64)).all()
        assert (corners[:, 2:] - corners[:, :2] >= 1).all()
        assert len(jittered["labels"]) == len(corners) == len(jittered["masks"])
        if len(corners):
            masks = torch.as_tensor(jittered["masks"])
            assert (masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1]) - corners).abs().max() <= 1
            inner = 1 - F.max_pool2d(F.pad(1 - masks.amax(0, keepdim=True).float(), [1] * 4, value=1.0), 3, 1)
            assert (pixels[0][inner[0] > 0] > 2).all()  # the objects are white, 2.5, the rest −2.5
        counts.append(len(corners))
    assert max(counts) == 2
    assert min(counts) < 2  # some were cut away


def test_an_object_that_is_cut_has_the_box_of_what_is_left_of_its_mask():
    image, target = made_image(40, 40, (0, 0, 40, 40))
    target["masks"][0] = torch.eye(40).to(torch.uint8)  # a thin diagonal in a large box
    transform = large_scale_jitter(20, **NORMALIZATION, scale_range=(2, 2), horizontal_flip=0)
    seen = set()
    for _ in range(60):
        jittered = transform(image, target)[1]
        if len(jittered["boxes"]):
            left, top, right, bottom = jittered["boxes"][0].tolist()
            assert right - left == bottom - top == jittered["masks"].sum()
            seen.add((left, top))
    assert len(seen) > 10


def test_jitter_without_objects_gives_empty_targets_of_the_right_shapes():
    for image, target in (made_image(10, 20), made_image(10, 20, (3, 3, 4, 4))):
        transform = large_scale_jitter(16, **NORMALIZATION, scale_range=(0.3, 0.3))  # the pixel shrinks below one
        pixels, jittered = transform(image, target)
        assert pixels.shape == (3, 16, 16)
        assert (jittered["boxes"].shape, jittered["boxes"].dtype) == ((0, 4), torch.float32)
        assert (jittered["labels"].shape, jittered["labels"].dtype) == ((0,), torch.int64)
        assert (jittered["masks"].shape, jittered["masks"].dtype) == ((0, 16, 16), torch.uint8)


def test_jitter_covers_its_range_of_scales_and_follows_the_seed():
    image, target = made_image(32, 32, (0, 0, 32, 32))
    transform = pickle.loads(pickle.dumps(large_scale_jitter(32, **NORMALIZATION, scale_range=(0.1, 1.0))))
    torch.manual_seed(5)
    sides = [transform(image, target)[1]["boxes"][0, 2].item() for _ in range(200)]
    assert (min(sides), max(sides)) == (3, 32)
    assert abs(np.mean(sides) - 0.55 * 32) < 2
    torch.manual_seed(5)
    assert [transform(image, target)[1]["boxes"][0, 2].item() for _ in range(5)] == sides[:5]
    with pytest.raises(ValueError, match="smaller first"):
        large_scale_jitter(32, **NORMALIZATION, scale_range=(2.0, 0.1))


def test_evaluation_fits_the_longer_side_and_tells_the_way_back():
    image, target = made_image(21, 40, (2, 3, 8, 9))
    pixels, kept = detection_evaluation_transform(64, **NORMALIZATION)(image, target)
    assert pixels.shape == (3, 64, 64)
    assert (kept["image_size"], kept["original_size"]) == ((34, 64), (21, 40))
    assert (pixels[:, 34:] == 0).all()
    assert (pixels[:, :34] != 0).any(0).all()
    assert kept["boxes"] is target["boxes"]


def test_loaders_deal_out_scenes_with_their_objects(composed, caplog):
    caplog.set_level(logging.WARNING)
    source = CocoSource(*composed, keep_empty=True)
    loader = DenseLoader(
        source, transform=large_scale_jitter(32, **NORMALIZATION), num_channels=3, per_device_batch_size=4
    )
    batch = next(iter(loader))
    assert batch["pixel_values"].shape == (4, 3, 32, 32)
    assert [set(target) for target in batch["labels"]] == [{"boxes", "labels", "masks"}] * 4
    evaluation = DenseEvaluationLoader(
        source, transform=detection_evaluation_transform(32, **NORMALIZATION), num_channels=3
    )
    assert [sample.target["image_id"] for sample in evaluation] == source.image_ids.tolist()
    assert not caplog.records
