"""Independent references: formulas of the paper, of MAE and of SimMIM, as plain as possible, without a line of mimae.

Shapes: B images, N masks, L units of a mask, V visible units, D features.
"""

import math

import torch
from torch import distributions

# a model of 16 patches and 2 + 1 blocks; N = 4 masks of r = 0.75 see 4 patches each
TINY = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
# a Swin of 2 + 2 blocks on maps of 8 x 8 and 4 x 4 tokens, windows of 4 x 4, 16 mask units of one last token each;
# N = 2 masks of r = 0.5 see 8 units each
TINY_SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "encoder_stride": 4,
    "mask_patch_size": 4,
}


def masks_by_loops(noise: torch.Tensor, num_masks: int, num_visible: int) -> list[list[list[int]]]:
    """The visible patches of each image and mask, in order: a circular window from floor(i·L/N) of the permutation."""
    num_patches = noise.shape[1]
    visible = []
    for row in noise.tolist():
        permutation = sorted(range(num_patches), key=row.__getitem__)
        starts = [math.floor(i * num_patches / num_masks) for i in range(num_masks)]
        visible.append([[permutation[(s + k) % num_patches] for k in range(num_visible)] for s in starts])
    return visible


def info_nce_by_loops(views: torch.Tensor, temperature: float) -> torch.Tensor:
    """Eq. 7-8 for (B, N, D): a double loop over the ordered pairs of views of one image."""
    num_images, num_views, _ = views.shape
    units = {(b, i): views[b, i] / views[b, i].norm() for b in range(num_images) for i in range(num_views)}
    total = torch.zeros((), dtype=views.dtype)
    for anchor, u in units.items():
        negatives = torch.stack([u @ v / temperature for other, v in units.items() if other != anchor])
        for k in range(num_views):
            if k != anchor[1]:
                total = total - u @ units[anchor[0], k] / temperature + negatives.exp().sum().log()
    return total / num_views**2 / num_images


def gaussian_log_likelihood(latent: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Mean over the features of log N(latent; mean, variance), vectors in, scalar out."""
    return distributions.Normal(mean, variance.sqrt()).log_prob(latent).mean()


def club_by_loops(latent: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Eq. 10 for (B, N, D): log q(z_j|X_j) against its mean over the masks k of the same image, k = j included."""
    num_images, num_views, _ = latent.shape
    total = torch.zeros((), dtype=latent.dtype)
    for b in range(num_images):
        for j in range(num_views):
            own = gaussian_log_likelihood(latent[b, j], mean[b, j], variance[b, j])
            others = [gaussian_log_likelihood(latent[b, k], mean[b, j], variance[b, j]) for k in range(num_views)]
            total = total + own - sum(others) / num_views
    return total / (num_images * num_views)


def assert_terms_follow_the_paper(
    output, latent: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, temperature: float = 0.07
):
    """An output's terms are Eq. 7-10 of ẑ (B, N, D) and of V's Gaussians (B, N, G, D), a mixture's mean for G > 1."""
    latent, mean, variance = latent.double(), mean.double(), variance.double()
    nll, club = torch.zeros(2, dtype=torch.float64)
    for own_mean, own_variance in zip(mean.unbind(2), variance.unbind(2), strict=True):
        nll -= gaussian_log_likelihood(latent, own_mean, own_variance) / mean.shape[2]
        club += club_by_loops(latent, own_mean, own_variance) / mean.shape[2]
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(output.mi_max_loss.double(), info_nce_by_loops(latent, temperature), **close)
    torch.testing.assert_close(output.approximation_loss.double(), nll, **close)
    torch.testing.assert_close(output.mi_min_loss.double(), club, **close)


def sincos_by_loops(grid_size: tuple[int, int], width: int) -> torch.Tensor:
    """The official MAE's positions (1, 1+L, width): class token 0; column (width half) first, then row; sin, cos."""
    rows = [[0.0] * width]
    frequencies = [10000.0 ** (-k / (width // 4)) for k in range(width // 4)]
    for y in range(grid_size[0]):
        for x in range(grid_size[1]):
            column = [math.sin(x * f) for f in frequencies] + [math.cos(x * f) for f in frequencies]
            row = [math.sin(y * f) for f in frequencies] + [math.cos(y * f) for f in frequencies]
            rows.append(column + row)
    return torch.tensor([rows])


def noise_for_mask(visible: list[int], num_patches: int) -> torch.Tensor:
    """Noise (L,) from which ViTMAE's random masking cuts exactly this mask: the visible patches have the smallest."""
    order = visible + [patch for patch in range(num_patches) if patch not in visible]
    noise = torch.empty(num_patches)
    noise[order] = torch.arange(num_patches, dtype=torch.float32) / num_patches
    return noise


def assert_official_mae_statistics(model: torch.nn.Module, grid_size: tuple[int, int]):
    """Every parameter is as the official MAE (models_mae.py, `initialize_weights`) draws it, V's as Sec. 5.4 needs.

    xavier-uniform linear layers, the patch projection as a linear layer, q, k and v as one layer (timm's `qkv`), zero
    biases (one for V's variance), class and mask token N(0, 0.02), fixed sin-cos positions.
    """
    for name, parameter in model.named_parameters():
        value, kind = parameter.detach(), name.rsplit(".", 1)[-1]
        if kind in ("position_embeddings", "decoder_pos_embed"):
            torch.testing.assert_close(value, sincos_by_loops(grid_size, value.shape[-1]), msg=name)
            assert not parameter.requires_grad, name
            continue
        assert parameter.requires_grad, name
        if kind in ("cls_token", "mask_token"):
            assert 0.013 < value.std() < 0.027, name
            assert value.mean().abs() < 0.01, name
        elif "norm" in name:
            assert torch.all(value == (1 if kind == "weight" else 0)), name
        elif kind == "bias":
            assert torch.all(value == (1 if name.endswith("approximator.variance.3.bias") else 0)), name
        else:
            fan_out, fan_in = value.flatten(1).shape
            if any(projection in name for projection in ("q_proj", "k_proj", "v_proj")):
                fan_out *= 3
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert 0.97 * bound < value.abs().max() <= bound * (1 + 1e-6), name
            assert math.isclose(value.std().item(), bound / math.sqrt(3), rel_tol=0.08), name
            assert abs(value.mean().item()) < 0.1 * bound, name


def simmim_layer(name: str, depths: list[int]) -> int:
    """The layer of a parameter by the official rule (SimMIM's optimizer.py), from its name within the encoder.

    Stem 0, blocks 1, 2, … over all stages, a stage's downsampling with its last block, the last norm one beyond.
    """
    if name.startswith("embeddings."):
        return 0
    if not name.startswith("encoder.layers."):
        return sum(depths) + 1
    _, _, stage, part, block, *_ = name.split(".")
    before = sum(depths[: int(stage)])
    return before + (depths[int(stage)] if part == "downsample" else int(block) + 1)


def assert_official_simmim_statistics(model: torch.nn.Module):
    """Every parameter is as the official SimMIM (swin_transformer.py, simmim.py) draws it, V's as in MI-MAE.

    Linear layers, mask token and relative positions from a truncated N(0, 0.02), zero biases; convolutions, their
    biases too, as torch draws them: uniform within ±1/√fan_in (which is kaiming-uniform with a = √5).
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        value, kind = parameter.detach(), name.rsplit(".", 1)[-1]
        assert value.dtype == torch.float32, name
        if "norm" in name:
            assert torch.all(value == (1 if kind == "weight" else 0)), name
        elif name.endswith(("patch_embeddings.projection.bias", "decoder.0.bias")):
            assert_uniform(value, parameters[name.replace("bias", "weight")][0].numel() ** -0.5, name)
        elif kind == "bias":
            assert torch.all(value == (1 if name.endswith("approximator.variance.3.bias") else 0)), name
        elif name.startswith("approximator."):
            assert_uniform(value, math.sqrt(6 / sum(value.shape)), name)
        elif value.ndim == 4:
            assert_uniform(value, value[0].numel() ** -0.5, name)
        else:
            assert_normal(value, 0.02, name)


def assert_uniform(value: torch.Tensor, bound: float, name: str):
    """Drawn from U(-bound, bound), as far as so many values can show."""
    slack = 5 / math.sqrt(value.numel())
    assert value.abs().max() <= bound * (1 + 1e-6), name
    assert math.isclose(value.square().mean().item(), bound**2 / 3, rel_tol=slack), name
    assert abs(value.mean().item()) < slack * bound, name


def assert_normal(value: torch.Tensor, std: float, name: str):
    """Drawn from N(0, std), as far as so many values can show: second and fourth moment, and mean."""
    slack = 7 / math.sqrt(value.numel())
    assert math.isclose(value.square().mean().item(), std**2, rel_tol=slack), name
    assert math.isclose(value.pow(4).mean().item(), 3 * std**4, rel_tol=3 * slack), name
    assert abs(value.mean().item()) < slack * std, name
