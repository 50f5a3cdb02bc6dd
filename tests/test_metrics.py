"""The metrics agree with scikit-learn and with hand-computed values, and leave nothing on disk."""

import pickle

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, top_k_accuracy_score

from mimae.evaluation.metrics import TopKAccuracy, ranked_classes

SIX_IMAGES = {"predictions": [[0, 1], [1, 0], [1, 2], [2, 1], [0, 2], [2, 0]], "references": [0, 1, 2, 2, 1, 0]}


def scored(n, num_classes, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(n, num_classes)).astype(np.float32), random.integers(0, num_classes, n)


def test_accuracies_equal_scikit_learns():
    logits, labels = scored(500, 17)
    result = TopKAccuracy().compute(predictions=ranked_classes(torch.from_numpy(logits)), references=labels)
    assert result["accuracy"] == pytest.approx(accuracy_score(labels, logits.argmax(1)), abs=1e-12)
    assert result["top5_accuracy"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5), abs=1e-12)
    assert result["accuracy"] < result["top5_accuracy"] < 1


def test_accuracies_equal_hand_computed_ones():
    # four of six are right at once, none of the others is among the two that were ranked, but the last
    assert TopKAccuracy().compute(**SIX_IMAGES) == {"accuracy": 3 / 6, "top5_accuracy": 5 / 6}


def test_no_more_than_five_classes_count_however_many_are_ranked():
    ranked, labels = np.tile(np.arange(8), (8, 1)), np.arange(8)
    assert TopKAccuracy().compute(predictions=ranked, references=labels)["top5_accuracy"] == 5 / 8


def test_with_fewer_than_five_classes_the_top_five_are_all_of_them():
    logits, labels = scored(50, 3)
    result = TopKAccuracy().compute(predictions=ranked_classes(torch.from_numpy(logits)), references=labels)
    assert result["accuracy"] == pytest.approx(accuracy_score(labels, logits.argmax(1)))
    assert result["top5_accuracy"] == 1


def test_padding_is_left_out():
    logits, labels = scored(40, 10)
    ranked = ranked_classes(torch.from_numpy(logits)).numpy()
    expected = TopKAccuracy().compute(predictions=ranked, references=labels)
    # what the trainer makes of the last, smaller batch of a process: predictions are padded as well
    padded = np.concatenate([ranked, np.full((9, 5), -100)])
    assert TopKAccuracy().compute(predictions=padded, references=[*labels, *[-100] * 9]) == expected
    for nothing in ([-100] * 49, []):
        with pytest.raises(ValueError, match="no image to count"):
            TopKAccuracy().compute(predictions=padded[: len(nothing)], references=nothing)


def test_batches_add_up_to_the_whole():
    logits, labels = scored(40, 10)
    ranked = ranked_classes(torch.from_numpy(logits))
    metric, other = TopKAccuracy(), TopKAccuracy()
    for start in (0, 16, 32):
        metric.add_batch(predictions=ranked[start : start + 16], references=labels[start : start + 16])
        other.add_batch(predictions=ranked[:1], references=ranked[:1, 0])  # as another process has its own
    assert metric.compute() == TopKAccuracy().compute(predictions=ranked, references=labels)
    assert other.compute()["accuracy"] == 1


def test_metrics_leave_nothing_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    TopKAccuracy().compute(**SIX_IMAGES)
    metric = TopKAccuracy()
    metric.add_batch(**SIX_IMAGES)
    assert not list(tmp_path.iterdir())


def test_metrics_can_be_pickled():
    metric = pickle.loads(pickle.dumps(TopKAccuracy()))
    assert metric.compute(**SIX_IMAGES) == TopKAccuracy().compute(**SIX_IMAGES)


def test_the_randomness_of_the_caller_is_left_alone():
    state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    TopKAccuracy().compute(**SIX_IMAGES)
    assert np.array_equal(np.random.get_state()[1], state)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_ranked_classes_are_those_of_a_full_sort():
    logits, _ = scored(20, 9)
    expected = np.argsort(-logits, axis=1)[:, :5]
    assert np.array_equal(ranked_classes(torch.from_numpy(logits)).numpy(), expected)
    assert ranked_classes(torch.zeros(4, 2)).shape == (4, 2)
