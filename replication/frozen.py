"""What the frozen encoder of a run is worth, and what its features look like.

Shapes: n images, N masks, D features.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mimae.data.batches.loaders import evaluation_batches
from mimae.data.images.transforms import Normalization, channel_statistics, evaluation_transform
from mimae.evaluation.features import Encoder, evaluating, extract_features
from mimae.evaluation.probes import knn_accuracy, linear_probe_accuracy
from mimae.families.registry import family_named
from mimae.flags.data import DataArguments
from mimae.jobs.monitors import probe_indices
from mimae.modeling_mim import EncoderOutput, MIMForPreTrainingMixin

BATCH = 500
PROBE_IMAGES = 10_000  # of training, the same for all, that probes are fitted on
MASKED_IMAGES = 2000  # on which masked views are compared
MASK_FIELDS = ("mask_ratio", "num_masks", "mask_strategy")  # at whose defaults the views of all arms are compared


def measure_frozen(checkpoint: Path, recipe: Mapping[str, Any], device: torch.device) -> dict[str, float]:
    """Accuracies in percent on all test images, and the geometry of the features.

    Args:
        checkpoint: what pre-training has left.
        recipe: of the pre-training; it names the images and how they are normalised.

    Returns:
        `knn` (k = 20), `linear_mean`, `linear_cls` (logistic regressions on the mean of the patches and on the class
        token, where there is one), `rank`, and what `compare_views` returns.
    """
    data = DataArguments(**{f.name: recipe[f.name] for f in fields(DataArguments) if f.name in recipe})
    train, test = data.open_split(data.train_split), data.open_held_out()
    if test is None:
        raise ValueError("the recipe names no held-out images")
    family = family_named(recipe.get("model_type"))
    model = family.pretraining_class.from_pretrained(checkpoint).to(device)
    config = model.config
    normalize = Normalization(
        *channel_statistics(config.num_channels, recipe.get("image_mean"), recipe.get("image_std")), device
    )
    read: dict[str, Any] = {
        "transform": evaluation_transform(config.image_size_2d, crop_ratio=recipe["evaluation_crop_ratio"]),
        "num_channels": config.num_channels,
        "batch_size": BATCH,
    }
    encoder = Poolings(model, has_class_token="cls" in family.poolings)
    (train_x, train_y), (test_x, test_y) = (
        extract_features(
            encoder,
            evaluation_batches(source, indices=probe_indices(source, limit), **read),
            normalize=normalize,
            device=device,
        )
        for source, limit in ((train, PROBE_IMAGES), (test, len(test)))
    )
    found = {}
    for index, name in enumerate(encoder.names):
        part = slice(index * config.hidden_size, (index + 1) * config.hidden_size)
        features = (train_x[:, part], train_y, test_x[:, part], test_y)
        found[f"linear_{name}"] = 100 * linear_probe_accuracy(*features)
        if name == "mean":
            found["knn"] = 100 * knn_accuracy(*features)
            found["rank"] = effective_rank(test_x[:, part])
    common_masks = {name: getattr(family.config_class, name) for name in MASK_FIELDS}
    model = family.pretraining_class.from_pretrained(checkpoint, **common_masks).to(device)
    some = evaluation_batches(test, indices=probe_indices(test, MASKED_IMAGES), **read)
    return found | compare_views(model, (normalize(batch["pixel_values"].to(device)) for batch in some))


class Poolings(nn.Module):
    """An encoder whose `pooler_output` has several poolings of its tokens side by side, in the order of `names`."""

    encoder: Encoder

    def __init__(self, encoder: Encoder, has_class_token: bool):
        super().__init__()
        self.encoder = encoder
        self.names = ("mean", "cls") if has_class_token else ("mean",)

    def encode(self, pixel_values: torch.Tensor) -> EncoderOutput:
        """(B, C, H, W) → `pooler_output` (B, D · number of poolings)."""
        output = self.encoder.encode(pixel_values)
        pooled = {"mean": output.feature_map.flatten(2).mean(dim=2), "cls": output.last_hidden_state[:, 0]}
        return EncoderOutput(pooler_output=torch.cat([pooled[name] for name in self.names], dim=-1))


@torch.inference_mode()
def compare_views(model: MIMForPreTrainingMixin, batches: Iterable[torch.Tensor]) -> dict[str, float]:
    """Reconstruction, and how near to one another the latents of views lie, under the same masks each time.

    Alignment is the mean squared distance of two views of an image, uniformity the logarithm of the mean Gaussian
    potential of two views of different images, both on the unit sphere (Wang and Isola 2020, Sec. 4): 0 and -4 are
    the best that they can be, and features that have collapsed have 0 and 0.

    Returns:
        `common_reconstruction_loss`, `alignment`, `uniformity`.
    """
    random = torch.Generator().manual_seed(0)
    losses, latents = [], []
    with evaluating(model):
        for pixel_values in batches:
            noise = torch.rand(len(pixel_values), *model.config.noise_shape, generator=random)
            output = model(pixel_values, noise=noise.to(pixel_values.device), return_logits=False)
            losses += [output.reconstruction_loss.item()] * len(pixel_values)
            latents.append(output.latent_vector.float().cpu())
    latent = F.normalize(torch.cat(latents), dim=-1)  # (n, N, D)
    num_views = latent.shape[1]
    apart = torch.cdist(latent, latent).square()  # (n, N, N)
    one_each = torch.pdist(latent[:, 0]).square()  # of different images
    return {
        "common_reconstruction_loss": float(np.mean(losses)),
        "alignment": float(apart.sum() / len(latent) / (num_views * (num_views - 1))),
        "uniformity": float(one_each.mul(-2).exp().mean().log()),
    }


def effective_rank(features: np.ndarray) -> float:
    """RankMe (Garrido et al. 2023, Eq. 3): the exponential of the entropy of the normalised singular values.

    Args:
        features: (n, D), as they are: not centred.
    """
    values = np.linalg.svd(features, compute_uv=False)
    shares = values / values.sum() + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))
