"""Probes of frozen features: nearest neighbours and a linear classifier, both from scikit-learn.

Both are quick checks during training. The linear probe of the papers, with its own optimiser and augmentation, is a
separate task.

Shapes: n images, D features; train and test have their own n.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

NUM_NEIGHBORS = (10, 20, 100, 200)  # those of DINO (facebookresearch/dino, eval_knn.py)


def knn_accuracies(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    ks: Sequence[int] = NUM_NEIGHBORS,
    temperature: float = 0.07,
) -> dict[int, float]:
    """Accuracies of the k nearest training images by cosine similarity, voting with exp(similarity / temperature).

    The classifier of Wu et al. 2018 (arXiv 1805.01978, Sec. 3.4), whose τ is 0.07. Neighbours are searched once for
    all k, block by block: beside the features and their scaled copies, memory grows with n_test · max(ks) alone.

    Args:
        train_features, test_features: (n, D).
        train_labels, test_labels: (n,), class indices.
        ks: numbers of neighbours that vote; all training images where there are fewer.
        temperature: if small, the nearest decide; if large, all votes count alike.

    Returns:
        for each number of neighbours that voted the fraction of test images classified right, in [0, 1].

    Raises:
        ValueError: a set is empty, features and labels do not belong together, or a k is below 1.
    """
    _check(train_features, train_labels, test_features, test_labels)
    if min(ks) < 1:
        raise ValueError(f"k counts neighbours and is at least 1, got {tuple(ks)}")
    search = NearestNeighbors(n_neighbors=min(max(ks), len(train_features)), algorithm="brute")
    search.fit(normalize(train_features))
    distance, neighbor = search.kneighbors(normalize(test_features))  # (n_test, max k), nearest first
    # On the unit sphere similarity = 1 - distance² / 2; relative to the nearest's, exp cannot overflow.
    weight = np.exp((distance[:, :1] ** 2 - distance**2) / (2 * temperature))
    label = train_labels[neighbor]
    used = sorted({min(k, len(train_features)) for k in ks})
    return {k: float(np.mean(_vote(label[:, :k], weight[:, :k]) == test_labels)) for k in used}


def _vote(label: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The class with the largest sum of weights among the neighbours of each image: (n, k), (n, k) → (n,)."""
    n, k = label.shape
    votes = csr_array((weight.flatten(), label.flatten(), np.arange(0, n * k + 1, k)), shape=(n, label.max() + 1))
    # (n, K), where a class has several entries they count as their sum; of SciPy 1.13 the argmax is (n, 1)
    return votes.argmax(axis=1).ravel()


def knn_accuracy(*features_and_labels: np.ndarray, k: int = 20, temperature: float = 0.07) -> float:
    """`knn_accuracies` for one k."""
    (accuracy,) = knn_accuracies(*features_and_labels, ks=(k,), temperature=temperature).values()
    return accuracy


def linear_probe_accuracy(
    train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray
) -> float:
    """Accuracy of a logistic regression (L-BFGS) on features scaled to zero mean and unit variance over training.

    Args:
        train_features, test_features: (n, D).
        train_labels, test_labels: (n,), class indices.

    Returns:
        The fraction of test images classified right, in [0, 1].

    Raises:
        ValueError: a set is empty, features and labels do not belong together, or training has a single class.
    """
    _check(train_features, train_labels, test_features, test_labels)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(train_features, train_labels)
    return float(classifier.score(test_features, test_labels))


def _check(
    train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray
) -> None:
    for name, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        if len(features) == 0:
            raise ValueError(f"{name}_features is empty: a probe needs images on both sides")
        if features.ndim != 2 or labels.shape != (len(features),):
            raise ValueError(
                f"{name}_features must be (n, D) and {name}_labels (n,), but they are {features.shape} "
                f"and {labels.shape}"
            )
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"train_features has {train_features.shape[1]} features and test_features {test_features.shape[1]}: take "
            "both from the same encoder"
        )
