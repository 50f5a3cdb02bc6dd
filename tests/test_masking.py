"""The masks against loops over the rule, ViTMAE's own masking, and the counts that the paper claims."""

import pytest
import torch
from references import masks_by_loops
from transformers import ViTMAEConfig
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

from mimae.masking import complete_num_masks, masks_from_ids, multi_mask_ids, num_visible_patches

SIZES = (196, 64, 49, 36)


def times_seen(num_patches: int, num_masks: int, num_visible: int, num_images: int = 3) -> torch.Tensor:
    """How many masks see each patch, (B, L)."""
    ids = multi_mask_ids(torch.rand(num_images, num_patches), num_masks, num_visible)
    mask, _ = masks_from_ids(ids, num_visible)
    return (1 - mask).sum(dim=1)


@pytest.mark.parametrize(
    ("mask_ratio", "num_masks"),
    [(0.1, 2), (0.2, 2), (0.3, 2), (0.4, 2), (0.5, 2), (0.6, 3), (0.7, 4), (0.75, 4), (0.8, 5), (0.9, 10)],
)
def test_complete_masking_takes_as_many_masks_as_the_ratio_needs(mask_ratio, num_masks):
    assert complete_num_masks(mask_ratio) == num_masks


@pytest.mark.parametrize("num_patches", SIZES)
@pytest.mark.parametrize("mask_ratio", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9])
def test_complete_masking_shows_every_patch(mask_ratio, num_patches):
    num_visible = num_visible_patches(num_patches, mask_ratio, num_masks=None)
    assert times_seen(num_patches, complete_num_masks(mask_ratio), num_visible).min() >= 1


def test_complete_masking_grows_the_windows_only_where_rounding_would_leave_gaps():
    assert num_visible_patches(196, 0.9, num_masks=10) == 19
    assert num_visible_patches(196, 0.9, num_masks=None) == 20
    assert num_visible_patches(196, 0.75, num_masks=None) == 49


@pytest.mark.parametrize(("num_patches", "num_masks"), [(196, 4), (64, 4), (36, 4), (36, 2), (16, 8)])
def test_orthogonal_masks_partition_the_image(num_patches, num_masks):
    assert torch.all(times_seen(num_patches, num_masks, num_patches // num_masks) == 1)


def test_four_fixed_masks_at_a_high_ratio_are_disjoint_and_leave_patches_unseen():
    seen = times_seen(196, 4, num_visible_patches(196, 0.9, num_masks=4))
    assert seen.max() == 1
    assert torch.all((seen == 0).sum(dim=1) == 120)


@pytest.mark.parametrize("num_masks", [2, 3, 4, 5, 6, 8, 10])
@pytest.mark.parametrize("mask_ratio", [0.1, 0.3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("num_patches", SIZES)
def test_overlap_is_the_least_possible(num_patches, mask_ratio, num_masks):
    # no patch is seen by two masks more than another: for 6 and 8 masks at 0.75 a cover with the least overlap
    num_visible = num_visible_patches(num_patches, mask_ratio, num_masks)
    seen = times_seen(num_patches, num_masks, num_visible)
    assert seen.min() == num_masks * num_visible // num_patches
    assert seen.max() == -(-num_masks * num_visible // num_patches)


@pytest.mark.parametrize(("num_patches", "num_masks", "num_visible"), [(196, 4, 49), (49, 6, 12), (36, 10, 4)])
def test_masks_are_windows_of_one_permutation(num_patches, num_masks, num_visible):
    noise = torch.rand(2, num_patches)
    ids = multi_mask_ids(noise, num_masks, num_visible)
    assert ids.shape == (2, num_masks, num_patches)
    assert ids.dtype == torch.int64
    assert ids[..., :num_visible].tolist() == masks_by_loops(noise, num_masks, num_visible)


@pytest.mark.parametrize("num_masks", [1, 4, 6])
def test_mask_and_ids_restore_describe_the_same_visible_patches(num_masks):
    ids = multi_mask_ids(torch.rand(3, 36), num_masks, num_visible=9)
    mask, ids_restore = masks_from_ids(ids, num_visible=9)
    assert torch.all(mask.sum(dim=-1) == 27)  # 0 is keep, 1 is remove
    for b in range(3):
        for i in range(num_masks):
            assert torch.all(mask[b, i, ids[b, i, :9]] == 0)
            assert torch.equal(ids[b, i][ids_restore[b, i]], torch.arange(36))


def random_masking_of_vit_mae(noise: torch.Tensor, mask_ratio: float) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Stock ViTMAE's mask, ids_restore and number of visible patches."""
    embeddings = ViTMAEEmbeddings(ViTMAEConfig(image_size=16, patch_size=8, hidden_size=4, mask_ratio=mask_ratio))
    visible, mask, ids_restore = embeddings.random_masking(torch.zeros(*noise.shape, 4), noise)
    return mask, ids_restore, visible.shape[1]


@pytest.mark.parametrize("num_patches", SIZES)
@pytest.mark.parametrize("mask_ratio", [0.1, 0.4, 0.5, 0.6, 0.75, 0.8, 0.9])
def test_one_mask_is_vit_mae_random_masking(num_patches, mask_ratio):
    noise = torch.rand(3, num_patches)
    expected_mask, expected_restore, expected_visible = random_masking_of_vit_mae(noise, mask_ratio)

    num_visible = num_visible_patches(num_patches, mask_ratio, num_masks=1)
    mask, ids_restore = masks_from_ids(multi_mask_ids(noise, 1, num_visible), num_visible)

    assert num_visible == expected_visible
    assert torch.equal(mask[:, 0], expected_mask)
    assert torch.equal(ids_restore[:, 0], expected_restore)


def test_independent_masks_are_vit_mae_random_maskings_of_their_own():
    noise = torch.rand(3, 4, 49)
    mask, ids_restore = masks_from_ids(multi_mask_ids(noise, 4, 12), 12)
    for i in range(4):
        expected_mask, expected_restore, _ = random_masking_of_vit_mae(noise[:, i], 0.75)
        assert torch.equal(mask[:, i], expected_mask)
        assert torch.equal(ids_restore[:, i], expected_restore)
    assert (1 - mask).sum(dim=1).max() > 1  # they overlap, as orthogonal ones would not


def test_images_are_masked_independently_of_each_other():
    noise = torch.rand(4, 64)
    together = multi_mask_ids(noise, 4, 16)
    assert torch.equal(together[2:3], multi_mask_ids(noise[2:3], 4, 16))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("num_visible", [-1, 0, 16, 17])
def test_a_mask_that_hides_nothing_or_everything_is_refused(num_visible):
    with pytest.raises(ValueError, match="num_visible"):
        multi_mask_ids(torch.rand(2, 16), 4, num_visible)


@pytest.mark.parametrize("shape", [(16,), (2, 3, 16), (2, 4, 1, 16)])
def test_noise_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="noise"):
        multi_mask_ids(torch.rand(shape), 4, 4)


@pytest.mark.parametrize("num_masks", [4, None])
def test_a_ratio_that_masks_nothing_is_refused(num_masks):
    with pytest.raises(ValueError, match="mask_ratio"):
        num_visible_patches(1, 0.75, num_masks)
    with pytest.raises(ValueError, match="mask_ratio"):
        num_visible_patches(49, 0.0, num_masks)


def test_at_least_one_patch_stays_visible():
    assert num_visible_patches(4, 0.9, num_masks=4) == 1
