"""What frozen features tell about labels: nearest neighbours and a linear classifier, both from scikit-learn.

Both are quick looks during training. The linear probe of the papers, with its own optimiser and augmentation, is a
task of its own.

Shapes: n images, D features; train and test have their own n.
"""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def knn_accuracy(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy of the k nearest training images by cosine similarity, each voting with exp(similarity / temperature).

    The classifier of Wu et al. 2018 (arXiv 1805.01978, Sec. 3.4), whose τ is 0.07.

    Args:
        train_features, test_features: (n, D).
        train_labels, test_labels: (n,), class indices.
        k: neighbours that vote; all of them where there are fewer.
        temperature: small lets the nearest decide, large counts heads.

    Returns:
        The fraction of test images classified right, in [0, 1].

    Raises:
        ValueError: a set is empty, or features and labels do not belong together.
    """
    _check(train_features, train_labels, test_features, test_labels)
    classifier = KNeighborsClassifier(
        n_neighbors=min(k, len(train_features)),
        metric="cosine",  # a distance, 1 - similarity
        weights=lambda distance: np.exp((1 - distance) / temperature),
    )
    classifier.fit(train_features, train_labels)
    return float(classifier.score(test_features, test_labels))


def linear_probe_accuracy(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    max_iter: int = 1000,
) -> float:
    """Accuracy of a logistic regression (L-BFGS) on features scaled to zero mean and unit variance over training.

    Args:
        train_features, test_features: (n, D).
        train_labels, test_labels: (n,), class indices.
        max_iter: iterations of L-BFGS; scikit-learn warns where they do not suffice.

    Returns:
        The fraction of test images classified right, in [0, 1].

    Raises:
        ValueError: a set is empty, features and labels do not belong together, or training has a single class.
    """
    _check(train_features, train_labels, test_features, test_labels)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=max_iter))
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
