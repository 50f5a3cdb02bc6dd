"""N masks of one image, cut from one permutation of its patches (Alg. 1 line 3, Sec. 5.1 and 5.3).

Mask i sees a circular window of V patches that starts at floor(i·L/N) of the permutation. This one rule gives

    N·V = L   an exact partition: "orthogonal" masks (the paper's default: L = 196, N = 4, V = 49)
    N·V > L   a cover of the image with the least overlap
    N·V < L   disjoint windows that leave some patches to no view

Shapes: B images, N masks, L patches, V visible patches per mask.
"""

import math

import torch


def complete_num_masks(mask_ratio: float) -> int:
    """Number of masks that shows every patch once: N = max(2, ceil(1 / (1 - r))) (Sec. 5.3, "complete masking").

    The paper prints `min`, which would give 2 masks for every ratio of one half and more. The quotient is rounded
    to 9 digits first, because 1 / (1 - 0.9) is 10.000000000000002 in floating point.
    """
    return max(2, math.ceil(round(1 / (1 - mask_ratio), 9)))


def num_visible_patches(num_patches: int, mask_ratio: float, num_masks: int | None) -> int:
    """V, the patches that one mask leaves visible; ViTMAE's own rounding, `int(L * (1 - r))`, but at least one.

    With `num_masks=None` (complete masking) V grows where that rounding would leave patches to no view.

    Raises:
        ValueError: no patch would be masked.
    """
    num_visible = max(1, int(num_patches * (1 - mask_ratio)))
    if num_masks is None:
        num_visible = max(num_visible, math.ceil(num_patches / complete_num_masks(mask_ratio)))
    if num_visible >= num_patches:
        raise ValueError(
            f"mask_ratio={mask_ratio} leaves no masked patch: all {num_patches} patches would be visible. "
            "Raise mask_ratio, or use smaller patches."
        )
    return num_visible


def multi_mask_ids(noise: torch.Tensor, num_masks: int, num_visible: int) -> torch.Tensor:
    """The order in which each mask takes the patches: the first V of each row are visible, the others masked.

    Args:
        noise: (B, L) for orthogonal masks, which share one permutation; (B, N, L) for independent ones (Table 3c).
        num_masks: N.
        num_visible: V.

    Returns:
        `ids_shuffle` (B, N, L), int64. With N = 1 it is exactly ViTMAE's `argsort(noise)`.

    Raises:
        ValueError: the noise has another shape, or V is not in 1 .. L - 1.
    """
    num_patches = noise.shape[-1]
    if not 1 <= num_visible < num_patches:
        raise ValueError(f"num_visible={num_visible} must lie in 1 .. {num_patches - 1} (of {num_patches} patches)")
    if noise.ndim == 3:
        if noise.shape[1] != num_masks:
            raise ValueError(f"noise for {num_masks} independent masks must be (B, {num_masks}, L), not {noise.shape}")
        return noise.argsort(dim=-1)

    if noise.ndim != 2:
        raise ValueError(f"noise must be (B, L) or (B, {num_masks}, L), not {tuple(noise.shape)}")
    permutation = noise.argsort(dim=-1)  # (B, L)
    starts = torch.arange(num_masks, device=noise.device) * num_patches // num_masks  # (N,)
    offsets = torch.arange(num_patches, device=noise.device)  # (L,)
    circular = (starts[:, None] + offsets) % num_patches  # (N, L)
    return permutation[:, circular]  # (B, N, L)


def masks_from_ids(ids_shuffle: torch.Tensor, num_visible: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`mask` (B, N, L), float, 0 is keep and 1 is remove, and `ids_restore` (B, N, L), the inverse permutation."""
    places = torch.arange(ids_shuffle.shape[-1], device=ids_shuffle.device).expand_as(ids_shuffle)
    ids_restore = torch.empty_like(ids_shuffle).scatter_(-1, ids_shuffle, places)
    mask = (ids_restore >= num_visible).float()
    return mask, ids_restore
