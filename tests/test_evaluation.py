"""Features are what `encode` gives, and the probes count what they say they count."""

import math
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from mimae.evaluation.features import extract_features
from mimae.evaluation.probes import NUM_NEIGHBORS, knn_accuracies, knn_accuracy, linear_probe_accuracy
from mimae.pictures import classes as pictures
from mimae.pictures.classes import save_confusion_matrix, save_feature_map

pytestmark = pytest.mark.usefixtures("drawn")


class Encoder(torch.nn.Module):
    """Nothing but `encode`. Its dropout shows the mode, its second part is frozen in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.projection = torch.nn.Linear(3 * 4 * 6, 5)
        self.dropout = torch.nn.Dropout(0.5)
        self.frozen = torch.nn.Dropout(0.5).eval()

    def encode(self, pixel_values):
        features = self.frozen(self.dropout(self.projection(pixel_values.flatten(1))))
        return SimpleNamespace(pooler_output=features.to(torch.bfloat16))


def make_batches(sizes):
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        yield {
            "pixel_values": torch.randint(256, (size, 3, 4, 6), dtype=torch.uint8, generator=generator),
            "labels": torch.arange(size, dtype=torch.int32),
        }


def to_float(pixels):
    assert pixels.dtype == torch.uint8
    return pixels.float() / 255


def test_features_are_those_of_encode_in_order():
    model = Encoder()
    features, labels = extract_features(model, make_batches([4, 4, 2]), normalize=to_float, device="cpu")
    model.eval()
    pixels = torch.cat([batch["pixel_values"] for batch in make_batches([4, 4, 2])])
    expected = model.encode(to_float(pixels)).pooler_output.float().detach().numpy()
    np.testing.assert_allclose(features, expected, rtol=1e-2)
    assert features.dtype == np.float32
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("training", [True, False])
def test_every_part_of_the_model_gets_its_mode_back_even_after_an_error(training):
    model = Encoder()
    model.dropout.train(training)
    before = [module.training for module in model.modules()]
    extract_features(model, make_batches([2]), normalize=to_float, device="cpu")
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="empty"):
        extract_features(model, [], normalize=to_float, device="cpu")
    with pytest.raises(KeyError):
        extract_features(model, [{}], normalize=to_float, device="cpu")
    assert [module.training for module in model.modules()] == before
    assert model.projection.weight.requires_grad


def at_angles(*degrees):
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def test_votes_are_weighted_by_the_exponential_of_similarity():
    """One neighbour at 10°, two of another class at 40°: by hand, τ = 0.1 gives e^9.85 against 2·e^7.66."""
    train, labels = at_angles(10, 40, -40), np.array([0, 1, 1])
    test, truth = at_angles(0), np.array([0])
    one, two = (math.cos(math.radians(angle)) for angle in (10, 40))
    assert math.exp(one / 0.1) > 2 * math.exp(two / 0.1)
    assert math.exp(one / 1.0) < 2 * math.exp(two / 1.0)
    assert knn_accuracy(train, labels, test, truth, k=3, temperature=0.1) == 1.0
    assert knn_accuracy(train, labels, test, truth, k=3, temperature=1.0) == 0.0
    # Where the votes tip, to a thousandth: exp((one - two) / τ) = 2.
    tipping = (one - two) / math.log(2)
    assert knn_accuracy(train, labels, test, truth, k=3, temperature=0.999 * tipping) == 1.0
    assert knn_accuracy(train, labels, test, truth, k=3, temperature=1.001 * tipping) == 0.0


def test_neighbours_are_found_by_angle_and_not_by_length():
    train = np.concatenate([100 * at_angles(5), at_angles(60)])
    assert knn_accuracy(train, np.array([0, 1]), at_angles(0), np.array([0]), k=1) == 1.0


def test_k_counts_neighbours_and_is_capped_at_the_training_set():
    train, labels = at_angles(0, 20, 25), np.array([0, 1, 1])
    test, truth = at_angles(1), np.array([0])
    assert knn_accuracy(train, labels, test, truth, k=1, temperature=10) == 1.0
    assert knn_accuracy(train, labels, test, truth, k=3, temperature=10) == 0.0
    assert knn_accuracy(train, labels, test, truth, k=20, temperature=10) == 0.0


@pytest.mark.parametrize("temperature", [0.07, 0.02, 10])
def test_accuracies_for_several_k_equal_scikit_learns_one_by_one(temperature):
    train, test = (blobs(seed, 9.0) for seed in (0, 1))
    classifiers = {
        k: KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature))
        for k in (1, 10, 100)
    }
    expected = {k: classifier.fit(*train).score(*test) for k, classifier in classifiers.items()}
    assert knn_accuracies(*train, *test, ks=(1, 10, 100), temperature=temperature) == expected
    assert knn_accuracy(*train, *test, k=10, temperature=temperature) == expected[10]


def test_with_the_smallest_temperature_the_nearest_alone_decides():
    train, test = (blobs(seed, 9.0) for seed in (0, 1))
    nearest = knn_accuracy(*train, *test, k=1)
    assert knn_accuracies(*train, *test, ks=(10, 100), temperature=1e-7) == {10: nearest, 100: nearest}


def test_the_usual_numbers_of_neighbours_are_asked_and_capped_at_the_training_set():
    accuracies = knn_accuracies(*blobs(0, 9.0), *blobs(1, 9.0))
    assert NUM_NEIGHBORS == (10, 20, 100, 200)
    assert tuple(accuracies) == (10, 20, 100, 150)  # those that voted
    assert accuracies[150] == knn_accuracy(*blobs(0, 9.0), *blobs(1, 9.0), k=150)
    with pytest.raises(ValueError, match="at least 1"):
        knn_accuracies(*blobs(0, 9.0), *blobs(1, 9.0), ks=(0, 5))


def test_neighbours_are_found_without_a_matrix_of_all_distances():
    random = np.random.default_rng(0)
    train, test = (random.normal(size=(n, 8)).astype(np.float32) for n in (20_000, 1000))
    tracemalloc.start()
    knn_accuracies(train, random.integers(0, 5, 20_000), test, random.integers(0, 5, 1000), ks=(1, 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000 * 1000 * 4 / 10  # a tenth of the matrix in float32


def blobs(seed, spread):
    random = np.random.default_rng(seed)
    labels = np.arange(150) % 3
    centres = np.array([[9.0, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 0]])
    return (centres[labels] + spread * random.normal(size=(150, 4))).astype(np.float32), labels


@pytest.mark.parametrize("accuracy", [knn_accuracy, linear_probe_accuracy])
def test_separable_classes_are_told_apart_and_noise_is_not(accuracy):
    assert accuracy(*blobs(0, 1.0), *blobs(1, 1.0)) == 1.0
    train, train_labels = blobs(0, 1e4)
    test, test_labels = blobs(1, 1e4)
    assert 0.15 < accuracy(train, train_labels, test, test_labels) < 0.55


def test_the_linear_probe_does_not_depend_on_the_scale_of_features():
    (train, train_labels), (test, test_labels) = blobs(0, 4.0), blobs(1, 4.0)
    scale, shift = np.array([1e-3, 1, 1e3, 10], np.float32), np.float32(3)
    moved = linear_probe_accuracy(train * scale + shift, train_labels, test * scale + shift, test_labels)
    assert moved == linear_probe_accuracy(train, train_labels, test, test_labels)


@pytest.mark.parametrize("accuracy", [knn_accuracy, linear_probe_accuracy])
def test_what_does_not_belong_together_is_refused_by_name(accuracy):
    features, labels = blobs(0, 1.0)
    with pytest.raises(ValueError, match="test_features is empty"):
        accuracy(features, labels, features[:0], labels[:0])
    with pytest.raises(ValueError, match=r"train_features .* \(150, 4\) and \(149,\)"):
        accuracy(features, labels[1:], features, labels)
    with pytest.raises(ValueError, match="4 features and test_features 3"):
        accuracy(features, labels, features[:, :3], labels)


# --- pictures -------------------------------------------------------------------------------------------------------

NAMES = ["cat", "dog", "a bird whose name is far too long for a picture"]


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def dark(path):
    """Rows and columns of the dark pixels."""
    return np.nonzero(pixels(path).sum(2) < 200)


@pytest.mark.parametrize("num_classes", [2, 10, 40, 300])
def test_in_a_confusion_matrix_what_is_right_lies_on_the_diagonal_that_falls(tmp_path, num_classes):
    labels = np.repeat(np.arange(num_classes), 3)
    names = [str(label) for label in range(num_classes)]
    save_confusion_matrix(labels, labels, names, tmp_path / "right.png")
    save_confusion_matrix(labels, num_classes - 1 - labels, names, tmp_path / "wrong.png")
    right, wrong = (np.corrcoef(*dark(tmp_path / f"{name}.png"))[0, 1] for name in ("right", "wrong"))
    assert right > 0 > wrong
    assert {path.name for path in tmp_path.iterdir()} == {"right.png", "wrong.png"}


def test_in_a_confusion_matrix_the_predicted_class_is_the_column(tmp_path):
    labels = np.repeat(np.arange(10), 3)
    save_confusion_matrix(labels, 0 * labels, list("0123456789"), tmp_path / "all_zeros.png")
    rows, columns = dark(tmp_path / "all_zeros.png")
    assert columns.std() < rows.std() / 3
    assert np.median(columns) < pixels(tmp_path / "all_zeros.png").shape[1] / 4


def test_a_confusion_matrix_is_in_shares_of_each_class(tmp_path):
    # a frequent and a rare class, both half right, fill the four cells with one colour
    labels, predictions = np.array([0] * 100 + [1] * 2), np.array([0] * 50 + [1] * 50 + [0, 1])
    save_confusion_matrix(labels, predictions, ["a", "b"], tmp_path / "half.png")
    colours, counts = np.unique(pixels(tmp_path / "half.png").reshape(-1, 3), axis=0, return_counts=True)
    common = colours[counts > 0.1 * counts.sum()]
    assert len(common) == 2  # white, and the colour of a half
    assert counts[(colours == common[0]).all(1)] > 0.5 * counts.sum()


def test_a_map_of_features_is_the_same_for_the_same_seed(tmp_path):
    features, labels = blobs(0, 1.0)
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        save_feature_map(features[:60], labels[:60], NAMES, tmp_path / name, seed=seed)
    first, again, other = ((tmp_path / name).read_bytes() for name in ("first", "again", "other"))
    assert first == again != other
    assert len(list(tmp_path.iterdir())) == 3


def test_a_map_of_few_features_is_that_of_pca(tmp_path):
    features, labels = blobs(0, 1.0)
    for count, is_pca in ((49, True), (50, False)):
        for method in ("tsne", "pca"):
            save_feature_map(features[:count], labels[:count], NAMES, tmp_path / method, method=method)
        same = (tmp_path / "tsne").read_bytes() == (tmp_path / "pca").read_bytes()
        assert same == is_pca


def test_a_map_shows_no_more_images_than_can_be_told_apart(tmp_path, monkeypatch):
    features, labels = blobs(0, 1.0)
    colours = []
    for most in (150, 3):
        monkeypatch.setattr(pictures, "MOST_POINTS", most)
        save_feature_map(features, labels, NAMES, tmp_path / "map.png", method="pca")
        colours.append(coloured(tmp_path / "map.png"))
    assert colours[0] > 2 * colours[1]


def coloured(path):
    picture = pixels(path)
    return int((picture.max(2) - picture.min(2) > 60).sum())


def test_a_map_of_many_classes_is_drawn(tmp_path):
    features, labels = blobs(0, 1.0)
    save_feature_map(features, 40 * labels, list(map(str, range(100))), tmp_path / "map.png", method="pca")
    assert coloured(tmp_path / "map.png") > 1000


def test_what_cannot_be_drawn_is_refused_and_leaves_no_file(tmp_path):
    features, labels = blobs(0, 1.0)
    path = tmp_path / "picture.png"
    with pytest.raises(ValueError, match="2000 classes"):
        save_confusion_matrix(labels, labels, list(map(str, range(2000))), path)
    with pytest.raises(ValueError, match=r"labels \[2\] have no name: there are 2"):
        save_confusion_matrix(labels, labels, NAMES[:2], path)
    with pytest.raises(ValueError, match=r"labels \[-1\] have no name"):
        save_feature_map(features, labels - 1, NAMES, path)
    with pytest.raises(ValueError, match="no image to draw"):
        save_confusion_matrix(labels[:0], labels[:0], NAMES, path)
    with pytest.raises(ValueError, match=r"n, D >= 2 and n labels, got \(1, 4\) and 1"):
        save_feature_map(features[:1], labels[:1], NAMES, path)
    with pytest.raises(ValueError, match="'tsne' or 'pca', got 'umap'"):
        save_feature_map(features, labels, NAMES, path, method="umap")
    assert not list(tmp_path.iterdir())
