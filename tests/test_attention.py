"""Masks from attention, and the scores of Fig. 4, on maps whose answer is known by hand."""

import pytest
import torch

import vit
from attention import (
    attention_scores,
    cls_attention,
    jaccard,
    keep_mass,
    mass_on_object,
    overlay,
    to_pixels,
    token_attention,
)


def test_keep_mass_keeps_the_fewest_heaviest_patches_that_hold_the_mass():
    attention = (
        torch.tensor([[0.05, 0.40, 0.02], [0.08, 0.30, 0.15]]) / 2
    )  # as where [CLS] has the other half
    for mass, mask in (
        (0.6, [[False, True, False], [False, True, False]]),
        (0.8, [[False, True, False], [False, True, True]]),
    ):
        kept = keep_mass(attention, mass)
        torch.testing.assert_close(
            kept,
            torch.tensor(mask),
            msg=f"of the map\n{attention}\nthe fewest patches, of all "
            f"its rows, that hold {mass} are\n{torch.tensor(mask)}\nbut kept were\n{kept}",
        )


@pytest.mark.parametrize("mass", [0.1, 0.6, 0.8, 0.95])
def test_dropping_one_more_patch_would_keep_too_little(mass):
    attention = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) ** 4
    attention = attention / attention.sum(dim=(-2, -1), keepdim=True)
    kept = keep_mass(attention, mass)
    held = (attention * kept).sum(dim=(-2, -1))
    without_lightest = held - attention.masked_fill(~kept, torch.inf).amin(dim=(-2, -1))
    least, most = held.min().item(), without_lightest.max().item()
    assert least >= mass - 1e-6, f"the patches kept must hold at least {mass} of each map"
    assert most < mass + 1e-6, f"a patch too many: without the lightest they still hold {mass}"


def test_a_mass_that_is_just_reached_and_patches_of_one_weight_bring_no_patch_too_many():
    for attention, mass, number in (
        (torch.tensor([[0.5, 0.25, 0.25]]), 0.5, 1),
        (torch.full((2, 4), 0.125), 0.5, 4),
    ):
        kept = int(keep_mass(attention, mass).sum())
        assert kept == number, f"{number} of {attention.tolist()} hold {mass}, but {kept} were kept"


def test_jaccard_is_intersection_over_union():
    mask, truth = torch.zeros(2, 4, 5, dtype=torch.bool), torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[0, :2], truth[0, 1:3] = True, True  # 5 shared of 15
    assert jaccard(mask, truth).tolist() == pytest.approx([1 / 3, 0.0])


def test_mass_on_the_object_counts_shared_patches_by_the_pixels_that_the_object_covers():
    attention = torch.tensor([[[[0.5, 0.3], [0.1, 0.1]]]])
    truth = torch.zeros(1, 6, 6, dtype=torch.bool)
    truth[0, :3, :3] = True  # all of patch (0, 0)
    truth[0, :3, 3:4] = True  # a third of patch (0, 1)
    assert mass_on_object(attention, truth).item() == pytest.approx(0.6)


def test_scores_take_the_best_head_of_each_image():
    truth = torch.zeros(2, 4, 4, dtype=torch.bool)
    truth[:, :2, :2] = True
    on, off = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    scores = attention_scores(torch.stack([torch.stack([on, off]), torch.stack([off, on])]), truth)
    assert scores["jaccard_best_head_60"] == 100 and scores["mass_on_object"] == pytest.approx(0.5)


def test_maps_have_the_images_shape_and_leave_out_cls():
    network = vit.VisionTransformer(7, 35, embed_dim=22, depth=2, num_heads=2).eval()
    images = torch.randn(3, 3, 14, 77)
    maps = cls_attention(network, images)
    assert maps.shape == (3, 2, 2, 11)
    torch.testing.assert_close(
        maps[1, 0, 1, 3], network.get_last_selfattention(images)[1, 0, 0, 1 + 11 + 3]
    )
    assert to_pixels(maps, 7).shape == (3, 2, 14, 77)
    assert torch.equal(to_pixels(maps, 7)[0, 0, 7:14, 21:28], maps[0, 0, 1, 3].expand(7, 7))


def test_each_token_has_its_own_row_of_the_attention():
    """Token 0 is [CLS], and token 1 + i patch i."""
    network = vit.VisionTransformer(7, 35, embed_dim=22, depth=2, num_heads=2, init_std=0.5).eval()
    images = torch.randn(3, 3, 14, 77, generator=torch.Generator().manual_seed(0))
    tokens = [0, 1 + 13, 1 + 4, 1 + 21]
    maps = token_attention(network, images, tokens)
    assert maps.shape == (3, 2, 4, 2, 11)
    whole = network.get_last_selfattention(images)
    for number, token in enumerate(tokens):
        for row in range(2):
            for column in range(11):
                torch.testing.assert_close(
                    maps[:, :, number, row, column], whole[:, :, token, 1 + 11 * row + column]
                )
    torch.testing.assert_close(maps[:, :, 0], cls_attention(network, images))


def test_an_overlay_darkens_what_the_mask_leaves_out():
    image = torch.rand(3, 5, 3)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 2] = True
    shown = overlay(image, mask)
    assert torch.equal(shown[1, 2], image[1, 2])
    torch.testing.assert_close(shown[0], image[0] / 4)
