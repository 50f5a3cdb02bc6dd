"""Average precision equals pycocotools', detections find their way back to the image, pictures show them."""

import contextlib
import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as pycocotools_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import masks_to_boxes

from mimae.data import scenes
from mimae.data.sources.coco import CocoSource
from mimae.evaluation.detection import NAMES, _truth, detection_metrics, detection_records, restore_detections
from mimae.pictures.detection import save_detections

pytestmark = pytest.mark.usefixtures("drawn")

SIDE, NUM_IMAGES, CATEGORIES = 160, 40, (2, 5, 9)
IMAGE_SIZES = ("small", "medium", "large")


def ellipse(random, radius):
    """A random one, as bool (S, S) that is never empty."""
    y, x = random.uniform(0, SIDE, 2)
    height, width = radius * random.uniform(0.6, 1.0, 2)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    mask = ((rows - y) / height) ** 2 + ((columns - x) / width) ** 2 <= 1
    mask[min(int(y), SIDE - 1), min(int(x), SIDE - 1)] = True
    return mask


def shifted(mask, random, most):
    """Moved by up to so many pixels; what leaves the image is lost, and if all did, nothing is moved."""
    down, right = random.integers(-most, most + 1, 2)
    moved = np.roll(np.pad(mask, most), (down, right), axis=(0, 1))[most:-most, most:-most]
    return moved if moved.any() else mask


def code_of(mask):
    code = pycocotools_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": code["counts"].decode()}


def box_of(mask):
    left, top, right, bottom = masks_to_boxes(torch.from_numpy(mask)[None])[0].tolist()
    return [left, top, right + 1 - left, bottom + 1 - top]


def truth(random):
    """Objects of all sizes and some crowds on most images, none on others: COCO's file, and the masks by id."""
    annotations, masks = [], {}
    for image_id in range(1, NUM_IMAGES + 1):
        for _ in range(random.integers(0, 7)):
            number = len(annotations) + 1
            masks[number] = ellipse(random, random.choice([8, 30, 90]))
            crowd = random.random() < 0.15
            code = code_of(masks[number])
            if crowd:
                code = {"size": [SIDE, SIDE], "counts": scenes.run_lengths(masks[number])}
            annotations.append(
                {
                    "id": number,
                    "image_id": image_id,
                    "category_id": int(random.choice(CATEGORIES)),
                    "bbox": box_of(masks[number]),
                    "area": int(masks[number].sum()),
                    "iscrowd": int(crowd),
                    "segmentation": code,
                }
            )
    content = {
        "info": {},
        "images": [
            {"id": number, "file_name": f"{number}.png", "height": SIDE, "width": SIDE}
            for number in range(1, NUM_IMAGES + 1)
        ],
        "categories": [{"id": number, "name": f"class {number}"} for number in (*CATEGORIES, 11)],
        "annotations": annotations,
    }
    return content, masks


def plausible_records(random, content, masks):
    """Truths moved a little or a lot, twice, or of a wrong class; some missed; and some that are nowhere."""

    def record(image_id, category_id, mask):
        return {
            "image_id": image_id,
            "category_id": category_id,
            "bbox": (np.array(box_of(mask)) + random.normal(0, 0.7, 4)).clip(0.1).tolist(),
            "score": round(random.random(), 2),  # some are equal
            "segmentation": code_of(mask),
        }

    records = []
    for annotation in content["annotations"]:
        for _ in range(random.integers(0, 4)):
            category = random.choice(CATEGORIES) if random.random() < 0.2 else annotation["category_id"]
            moved = shifted(masks[annotation["id"]], random, int(random.choice([1, 3, 12])))
            records.append(record(annotation["image_id"], int(category), moved))
    for _ in range(40):
        image_id, category_id = random.integers(1, NUM_IMAGES + 1), random.choice(CATEGORIES)
        records.append(record(int(image_id), int(category_id), ellipse(random, 25)))
    return records


def by_pycocotools(path, records, image_ids):
    metrics = {}
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(str(path))
        for kind, evaluated, key in (("box", "bbox", "bbox"), ("mask", "segm", "segmentation")):
            results = [
                {name: record[name] for name in ("image_id", "category_id", "score", key)} for record in records
            ]
            evaluation = COCOeval(reference, reference.loadRes(results), evaluated)
            evaluation.params.imgIds = image_ids
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            metrics |= {f"{kind}_{name}": number for name, number in zip(NAMES, evaluation.stats, strict=True)}
    return metrics


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """An annotation file and records of detections in its images."""
    random = np.random.default_rng(3)
    content, masks = truth(random)
    path = tmp_path_factory.mktemp("truth") / "instances.json"
    path.write_text(json.dumps(content))
    return path, plausible_records(random, content, masks)


@pytest.mark.parametrize("image_ids", [None, range(5, 26)])
def test_all_numbers_equal_pycocotools(judged, image_ids, capsys):
    path, records = judged
    chosen = list(image_ids or range(1, NUM_IMAGES + 1))
    records = [record for record in records if record["image_id"] in chosen]
    assert image_ids or len(records) > 200
    metrics = detection_metrics(path, pickle.loads(pickle.dumps(records)), image_ids=image_ids)
    assert metrics == pytest.approx(by_pycocotools(path, records, chosen), abs=1e-6)
    assert len(metrics) == 24
    assert 0.05 < metrics["mask_ap"] < metrics["box_ap50"] < 0.95
    assert metrics["box_ap"] != metrics["mask_ap"]
    assert len({metrics[f"box_ap_{size}"] for size in IMAGE_SIZES}) == 3
    assert capsys.readouterr().out == ""


def test_the_order_of_processes_does_not_matter(judged):
    path, records = judged
    scores = np.random.default_rng(0).permutation(len(records)) / len(records)  # ties go by order, in COCO's tools too
    distinct = [record | {"score": float(score)} for record, score in zip(records, scores, strict=True)]
    assert detection_metrics(path, distinct[::-1]) == pytest.approx(detection_metrics(path, distinct), abs=1e-12)


def test_the_truth_itself_has_an_ap_of_one_and_crowds_need_not_be_found(judged):
    path, _ = judged
    objects = [truth for truth in json.loads(path.read_text())["annotations"] if not truth["iscrowd"]]
    metrics = detection_metrics(path, [truth | {"score": 0.9} for truth in objects])
    assert [metrics[f"{kind}_{name}"] for kind in ("box", "mask") for name in ("ap", "ar100")] == [1.0] * 4


def test_without_a_detection_all_numbers_are_zero(judged):
    metrics = detection_metrics(judged[0], [])
    assert len(metrics) == 24
    assert set(metrics.values()) == {0.0}


def small_truth(folder, **changes):
    """One image with one square of 36 pixels, numbered 0, which COCO's own tools would take for no object."""
    annotation = {"id": 0, "image_id": 4, "category_id": 9, "bbox": [4, 5, 6, 6], "area": 36}
    annotation["segmentation"] = [[4, 5, 10, 5, 10, 11, 4, 11]]
    content = {
        "images": [{"id": 4, "file_name": "a.png", "height": 20, "width": 30}],
        "categories": [{"id": 9, "name": "dog"}],
        "annotations": [annotation | changes],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


def found(boxes, labels, scores=None, masks=None):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": torch.ones(len(labels)) if scores is None else torch.tensor(scores),
        "masks": torch.ones(len(labels), 1, 28, 28) if masks is None else masks,
    }


def test_a_range_of_sizes_without_objects_has_no_number(tmp_path):
    metrics = detection_metrics(small_truth(tmp_path), [])
    assert {"box_ap", "box_ap_small", "mask_ar_small"} < set(metrics)
    assert not any(size in key for key in metrics for size in ("medium", "large"))


def test_with_nothing_to_find_there_is_no_metric(tmp_path):
    for change in ({"iscrowd": 1}, {"bbox": [4, 5, 0, 6]}, {"segmentation": {"size": [20, 30], "counts": "~~"}}):
        with pytest.raises(ValueError, match="no object to find in the 1 images"):
            detection_metrics(small_truth(tmp_path, **change), [])


def test_unknown_images_are_refused(judged):
    path, records = judged
    with pytest.raises(ValueError, match=r"2 image\(s\) .* does not have: ids \[77, 88\]"):
        detection_metrics(path, [], image_ids=[1, 77, 88])
    with pytest.raises(ValueError, match="have detections but are not evaluated"):
        detection_metrics(path, records, image_ids=[1])


def test_a_detection_in_the_models_pixels_finds_its_object(tmp_path):
    # the image of 20 x 30 was resized to 40 x 60
    detections = found([[8, 10, 20, 22]], [0])
    restored = restore_detections(detections, image_size=(40, 60), original_size=(20, 30))
    assert restored["boxes"].tolist() == [[4, 5, 10, 11]]
    records = detection_records(restored, image_id=4, category_ids=[9])
    assert records[0]["bbox"] == [4, 5, 6, 6]
    assert (records[0]["image_id"], records[0]["category_id"], records[0]["score"]) == (4, 9, 1.0)
    metrics = detection_metrics(small_truth(tmp_path), json.loads(json.dumps(records)))
    assert metrics["box_ap"] == 1.0
    assert metrics["mask_ap50"] == 1.0


def test_a_pasted_mask_lies_in_its_box():
    masks = torch.zeros(2, 1, 28, 28)
    masks[0, 0, :, :14] = 0.9  # the left half
    masks[1] = 0.49
    detections = found([[10, 20, 50, 80], [10, 20, 50, 80]], [0, 0], masks=masks)
    restored = restore_detections(detections, image_size=(50, 100), original_size=(100, 200))
    pixels = pycocotools_mask.decode(restored["masks"]).transpose(2, 0, 1)
    assert pixels.shape == (2, 100, 200)
    expected = np.zeros((100, 200))
    expected[40:100, 20:60] = 1  # the box, 20..100 x 40..160, ends at the image's lower edge
    assert (pixels[0] & (expected == 0)).sum() <= 0.05 * expected.sum()
    assert (pixels[0] == expected).mean() > 0.98
    assert not pixels[1].any()


def test_boxes_are_clipped_to_the_image():
    restored = restore_detections(found([[-5, 3, 70, 90]], [0]), image_size=(40, 60), original_size=(20, 30))
    assert restored["boxes"].tolist() == [[0, 1.5, 30, 20]]


def test_no_detections_are_no_records():
    restored = restore_detections(found([], []), image_size=(40, 60), original_size=(20, 30))
    assert restored["boxes"].shape == (0, 4)
    assert detection_records(restored, image_id=4, category_ids=[9]) == []


def test_a_diverged_model_is_named():
    for broken in (found([[1, 2, 3, float("nan")]], [0]), found([[1, 2, 3, 4]], [0], scores=[float("inf")])):
        with pytest.raises(ValueError, match="diverged"):
            restore_detections(broken, image_size=(40, 60), original_size=(20, 30))


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A composed scene and its objects, with digits for names, and the same as detections."""
    folder = tmp_path_factory.mktemp("scene")
    counts = ["--pretrain_images", "0", "--train_images", "1", "--validation_images", "0"]
    scenes.main(["--output_dir", str(folder), "--scene_size", "64", *counts])
    path = folder / "annotations" / "instances_train.json"
    source = CocoSource(path, folder / "images" / "train", keep_empty=True)
    image, target = source.decode(0, source.read(0), 3)
    size = tuple(image.shape[-2:])
    detections = restore_detections(
        found(target["boxes"].tolist(), target["labels"].tolist()), image_size=size, original_size=size
    )
    return image, detections, target, source.class_names


def test_a_picture_shows_detections_beside_the_truth(scene, tmp_path):
    image, detections, target, names = scene
    path = tmp_path / "detections.png"

    def drawn(detections):
        save_detections([image] * 3, [detections] * 3, [target] * 3, names, path)
        return np.asarray(Image.open(path).convert("RGB")).astype(int)

    unsure = detections | {"scores": torch.full_like(detections["scores"], 0.49)}
    with_detections, without = drawn(detections), drawn(unsure)
    changed = np.abs(with_detections - without).sum(-1) > 0
    height, width = changed.shape
    halves = [changed[: height // 2, column * width // 4 : (column + 1) * width // 4].any() for column in range(4)]
    assert halves == [False, True, False, True]  # true, detected, true, detected
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_take_grey_images_many_classes_and_nothing_detected(scene, tmp_path):
    image, _, target, _ = scene
    nothing = restore_detections(found([], []), image_size=(64, 64), original_size=(64, 64))
    names = [f"class {number}" for number in range(80)]
    target = target | {"labels": target["labels"] + 70}
    save_detections([image[:1]], [nothing], [target], names, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="2 images, 1 detections"):
        save_detections([image] * 2, [nothing], [target], names, tmp_path / "b.png")


def test_true_masks_survive_the_way_to_a_target_and_back_even_if_they_are_small():
    # a model that predicts its target exactly: the mean IoU that a detector can reach, for ellipses of 8 to 30 pixels
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:96, :96]
    overlaps = []
    for _ in range(50):
        (y, x), (height, width) = random.uniform(20, 76, size=2), random.uniform(4, 15, size=2)
        mask = torch.from_numpy(((rows - y) / height) ** 2 + ((columns - x) / width) ** 2 <= 1).to(torch.uint8)
        box = masks_to_boxes(mask[None]) + torch.tensor([0, 0, 1, 1])
        target = project_masks_on_boxes(mask[None], box, torch.zeros(1, dtype=torch.int64), 28)  # (1, 28, 28)
        found = restore_detections(
            {
                "boxes": box,
                "scores": torch.ones(1),
                "labels": torch.zeros(1, dtype=torch.int64),
                "masks": target[None],
            },
            image_size=(96, 96),
            original_size=(96, 96),
        )
        drawn = pycocotools_mask.decode(found["masks"][0]).astype(bool)
        overlaps.append((drawn & mask.bool().numpy()).sum() / (drawn | mask.bool().numpy()).sum())
    assert np.mean(overlaps) > 0.97


@pytest.mark.parametrize("area", [None, "12", float("nan")])
def test_an_area_that_is_no_number_is_that_of_the_mask(area):
    square = {"segmentation": [[2, 2, 6, 2, 6, 6, 2, 6]], "bbox": [2, 2, 4, 4], "area": area}
    assert _truth(square, 10, 10)["area"] == 16
