"""Windows cover every pixel and average right; the metrics agree with scikit-learn; pictures show what was given."""

import pickle

import evaluate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, jaccard_score

from mimae.evaluation.segmentation import MeanIoU, segment, sliding_window_logits
from mimae.pictures.segmentation import save_segmentations

pytestmark = pytest.mark.usefixtures("drawn")

K = 4


def label_maps(count=3, num_classes=K, seed=0):
    """Maps of different sizes, of every class; in the truth some pixels are ignored."""
    random = np.random.default_rng(seed)
    sizes = [(5 + number, 9 - number) for number in range(count)]
    predictions = [random.integers(0, num_classes, size) for size in sizes]
    references = [random.integers(0, num_classes, size) for size in sizes]
    for reference in references:
        reference[:2, :3] = 255
    return predictions, references


def flattened(maps, references):
    return np.concatenate([labels[reference != 255] for labels, reference in zip(maps, references, strict=True)])


# Metrics


def test_metrics_equal_scikit_learns():
    predictions, references = label_maps()
    predicted, true = flattened(predictions, references), flattened(references, references)
    metric = MeanIoU(K)
    metric.add_batch(predictions=predictions, references=references)
    assert metric.confusion_matrix.dtype == torch.int64
    assert np.array_equal(metric.confusion_matrix, confusion_matrix(true, predicted))
    result = metric.compute()
    assert result["per_class_iou"] == pytest.approx(jaccard_score(true, predicted, average=None))
    assert result["mean_iou"] == pytest.approx(jaccard_score(true, predicted, average="macro"))
    assert result["mean_accuracy"] == pytest.approx(balanced_accuracy_score(true, predicted))
    assert result["overall_accuracy"] == pytest.approx(accuracy_score(true, predicted))


def test_metrics_equal_hand_computed_ones():
    reference, prediction = torch.tensor([[0, 0, 1], [1, 255, 255]]), torch.tensor([[0, 1, 1], [2, 3, 0]])
    # class 0: 1 of 2; class 1: 1 of 3; class 2 is predicted but never true: 0 of 1; class 3 only where it is ignored
    assert MeanIoU(K).compute(predictions=[prediction], references=[reference]) == {
        "mean_iou": pytest.approx((1 / 2 + 1 / 3 + 0) / 3),
        "mean_accuracy": pytest.approx((1 / 2 + 1 / 2) / 2),
        "overall_accuracy": 2 / 4,
        "per_class_iou": [1 / 2, 1 / 3, 0, None],
    }


def test_a_right_prediction_has_everything_1():
    _, references = label_maps()
    predictions = [np.where(reference == 255, 0, reference) for reference in references]
    result = MeanIoU(K).compute(predictions=predictions, references=references)
    assert result == {"mean_iou": 1, "mean_accuracy": 1, "overall_accuracy": 1, "per_class_iou": [1] * K}


def test_matrices_of_several_processes_add_up_to_the_whole():
    predictions, references = label_maps()
    whole = MeanIoU(K).compute(predictions=predictions, references=references)
    one, other = MeanIoU(K), MeanIoU(K)
    one.add(prediction=predictions[0], reference=references[0])
    other.add_batch(predictions=predictions[1:], references=references[1:])
    one.confusion_matrix = one.confusion_matrix + other.confusion_matrix
    assert one.compute() == whole
    assert not one.confusion_matrix.any()  # begins anew


def test_narrow_integers_are_counted_like_wide_ones():
    predictions, references = label_maps(num_classes=100)
    narrow = [[labels.astype(np.uint8) for labels in maps] for maps in (predictions, references)]
    assert MeanIoU(100).compute(predictions=narrow[0], references=narrow[1]) == MeanIoU(100).compute(
        predictions=predictions, references=references
    )


def test_nothing_to_count_is_an_error_and_not_a_number():
    ignored = np.full((3, 3), 255)
    for maps in ([], [ignored]):
        with pytest.raises(ValueError, match="no pixel to count"):
            MeanIoU(K).compute(predictions=[np.zeros_like(labels) for labels in maps], references=maps)


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        ([[0, 4]], [[0, 1]], "4 classes, but labels of 0 to 4"),
        ([[0, 1]], [[0, -1]], "but labels of -1 to 1"),
        ([[0, 1]], [[0], [1]], r"a prediction of \(1, 2\) for a truth of \(2, 1\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(prediction, reference, message):
    with pytest.raises(ValueError, match=message):
        MeanIoU(K).add(prediction=torch.tensor(prediction), reference=torch.tensor(reference))


def test_the_metric_is_evaluates_leaves_nothing_on_disk_and_can_be_pickled(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    metric = pickle.loads(pickle.dumps(MeanIoU(K)))
    assert isinstance(metric, evaluate.Metric)
    predictions, references = label_maps()
    assert 0 < metric.compute(predictions=predictions, references=references)["mean_iou"] < 1
    assert not list(tmp_path.iterdir())


# Sliding windows


def pointwise(pixels):
    return torch.stack([pixels.sum(1), pixels[:, 0] ** 2], dim=1)  # (B, 2, h, w)


@pytest.mark.parametrize("size", [(8, 8), (20, 13), (9, 30), (5, 12), (3, 3)])
@pytest.mark.parametrize(("crop_size", "stride"), [(8, 5), (8, 8), (6, 2)])
def test_a_pointwise_model_sees_every_pixel_as_in_the_whole(size, crop_size, stride):
    pixel_values = torch.randn(2, 3, *size)
    logits = sliding_window_logits(pointwise, pixel_values, crop_size=crop_size, stride=stride, num_classes=2)
    torch.testing.assert_close(logits, pointwise(pixel_values))


def test_windows_stand_at_the_stride_and_the_last_one_inside_the_image():
    windows = []

    def number(pixels):
        windows.append((int(pixels[0, 0, 0, 0]), tuple(pixels.shape[2:])))
        return torch.full((1, 1, *pixels.shape[2:]), float(len(windows)))

    columns = torch.arange(11.0).expand(1, 1, 4, 11)
    logits = sliding_window_logits(number, columns, crop_size=4, stride=3, num_classes=1)
    assert windows == [(0, (4, 4)), (3, (4, 4)), (6, (4, 4)), (7, (4, 4))]
    # column 3 is in windows 1 and 2, column 6 in 2 and 3, columns 7 to 9 in 3 and 4
    assert logits[0, 0].tolist() == [[1, 1, 1, 1.5, 2, 2, 2.5, 3.5, 3.5, 3.5, 4]] * 4


@pytest.mark.parametrize(("length", "count"), [(512, 1), (513, 2), (683, 2), (853, 2), (854, 3), (2048, 6)])
def test_there_are_as_many_windows_as_mmsegmentation_has(length, count):
    sizes = []

    def record(pixels):
        sizes.append(pixels.shape)
        return pixels

    sliding_window_logits(record, torch.zeros(1, 1, 512, length), crop_size=512, stride=341, num_classes=1)
    assert len(sizes) == count == max(length - 512 + 341 - 1, 0) // 341 + 1


def test_a_small_image_is_padded_with_zeros_and_cut_back():
    seen = []

    def record(pixels):
        seen.append(pixels)
        return pixels

    logits = sliding_window_logits(record, torch.ones(1, 1, 3, 5), crop_size=8, stride=4, num_classes=1)
    assert logits.shape == (1, 1, 3, 5)
    assert len(seen) == 1
    assert seen[0].shape == (1, 1, 8, 8)
    assert seen[0].sum() == 15 == seen[0][..., :3, :5].sum()


def test_logits_in_half_precision_are_averaged_in_single():
    logits = sliding_window_logits(
        lambda pixels: pixels.bfloat16(), torch.ones(1, 1, 4, 9), crop_size=4, stride=1, num_classes=1
    )
    assert logits.dtype == torch.float32
    assert (logits == 1).all()


def test_gaps_and_logits_of_another_shape_are_refused():
    image = torch.zeros(1, 3, 16, 16)
    for stride in (9, 0):
        with pytest.raises(ValueError, match="leaves gaps"):
            sliding_window_logits(pointwise, image, crop_size=8, stride=stride, num_classes=2)
    with pytest.raises(ValueError, match=r"logits of \(1, 2, 8, 8\), expected \(1, 5, 8, 8\)"):
        sliding_window_logits(pointwise, image, crop_size=8, stride=4, num_classes=5)


@pytest.mark.parametrize("original_size", [(20, 30), (7, 41)])
def test_classes_are_those_of_the_resized_logits_at_the_original_size(original_size):
    image = torch.randn(3, 10, 15)
    labels = segment(pointwise, image, original_size, crop_size=8, stride=5, num_classes=2)
    expected = F.interpolate(pointwise(image[None]), size=original_size, mode="bilinear")[0].argmax(0)
    assert (labels.dtype, tuple(labels.shape)) == (torch.int64, original_size)
    assert (labels == expected).float().mean() > 0.99  # but for ties and rounding


# Pictures


def scene(height=24, width=32, channels=3):
    image = torch.full((channels, height, width), 128, dtype=torch.uint8)
    reference = torch.zeros(height, width, dtype=torch.int64)
    reference[:, width // 2 :] = 1
    reference[: height // 3] = 255
    return image, torch.zeros_like(reference), reference


def test_pictures_of_any_size_and_many_classes_are_written(tmp_path):
    scenes = [scene(), scene(40, 20, channels=1), scene(1, 1)]
    for num_classes in (2, 150):
        path = tmp_path / f"{num_classes}.png"
        save_segmentations(*zip(*scenes, strict=True), [f"class {k}" for k in range(num_classes)], path)
        assert min(Image.open(path).size) > 300
    assert len(list(tmp_path.iterdir())) == 2  # no partial file stays


def test_a_picture_shows_truth_prediction_and_what_is_ignored(tmp_path):
    image, prediction, reference = scene()
    pictures = []
    for number, labels in enumerate((prediction, reference.clamp(max=1), torch.where(reference == 255, 2, 0))):
        save_segmentations([image], [labels], [reference], ["a", "b", "c"], tmp_path / f"{number}.png")
        pictures.append(np.asarray(Image.open(tmp_path / f"{number}.png").convert("RGB")))
    assert not np.array_equal(pictures[0], pictures[1])  # the right half of the prediction is of another class
    assert np.array_equal(pictures[0], pictures[2])  # what is predicted for ignored pixels makes no difference


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image, prediction, reference: ([], [], []), "no image"),
        (lambda image, prediction, reference: ([image], [prediction[1:]], [reference]), "a label map of"),
        (lambda image, prediction, reference: ([image], [prediction + 7], [reference]), r"classes \[7\] have no name"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        save_segmentations(*change(*scene()), ["a", "b"], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
