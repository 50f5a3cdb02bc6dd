"""Features are what `encode` gives, and the probes count what they say they count."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mimae.evaluation.features import extract_features
from mimae.evaluation.probes import knn_accuracy, linear_probe_accuracy


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
