"""The AUC of figure against ground is that of all pairs of pixels, and other images choose."""

import math

import pytest
import torch
from torch import Tensor

from evals import figure_ground
from evals.figure_ground import (
    PRIOR,
    auc,
    aucs,
    best_head_aucs,
    best_of_either_sign,
    bootstrap,
    centre_prior,
    combined,
    figure_ground_scores,
    fit_logistic,
    patch_rows,
    pixels_in_patches,
    to_patches,
)


def random_image(seed: int, heads: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Attention (h, 3, 5), whose values often tie, objects (2, 11, 17) and void (11, 17)."""
    generator = torch.Generator().manual_seed(seed)
    attention = torch.randint(1, 5, (heads, 3, 5), generator=generator).float()
    numbers = torch.randint(0, 4, (11, 17), generator=generator)  # 0 the ground, 3 void
    return attention, torch.stack([numbers == 1, numbers == 2]), numbers == 3


def patches_of(images: list[tuple[Tensor, Tensor, Tensor]]) -> figure_ground.Patches:
    rows = [patch_rows(number, *image) for number, image in enumerate(images)]
    return to_patches(torch.cat(rows))


def naive_auc(scores: Tensor, objects: Tensor, void: Tensor) -> float:
    """The fraction of pairs of a figure's and a ground's pixel with the figure's above, in %."""
    rows, columns = scores.shape
    height, width = void.shape
    figure, ground = [], []
    for y in range(height):
        for x in range(width):
            score = scores[y * rows // height, x * columns // width].item()
            if void[y, x]:
                continue
            (figure if objects[:, y, x].any() else ground).append(score)
    right = 0.0
    for one in figure:
        for other in ground:
            right += (one > other) + 0.5 * (one == other)
    return 100 * right / (len(figure) * len(ground))


@pytest.mark.parametrize("seed", range(5))
def test_the_auc_is_that_of_all_pairs_of_pixels(seed):
    """Of each head, of the heads' mean and of the prior; void pixels count nowhere."""
    attention, objects, void = random_image(seed)
    patches = patches_of([(attention, objects, void)])
    for head, found in zip(attention, aucs(patches.heads, patches)[0]):
        assert found.item() == pytest.approx(naive_auc(head, objects, void))
    values, _ = figure_ground_scores(patches)
    mean = naive_auc(attention.mean(dim=0), objects, void)
    assert values["AUC, heads' mean"].tolist() == pytest.approx([mean])
    prior = naive_auc(centre_prior(3, 5).view(3, 5), objects, void)
    assert values[PRIOR].tolist() == pytest.approx([prior])


def test_an_auc_is_100_for_what_is_right_0_for_its_reverse_and_50_for_a_constant():
    figure = torch.tensor([0.0, 0.0, 2.0, 3.0])
    ground = torch.tensor([5.0, 7.0, 0.0, 0.0])
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert auc(scores, figure, ground) == 100
    assert auc(-scores, figure, ground) == 0
    assert auc(torch.ones(4), figure, ground) == 50
    assert auc(scores, figure, torch.zeros(4)).isnan(), "without ground there is no pair"


def test_a_pixel_lies_in_the_patch_that_nearest_gives_it():
    mask = torch.rand(11, 17, generator=torch.Generator().manual_seed(0)) > 0.4
    ids = torch.arange(15.0).view(1, 1, 3, 5)
    at_pixels = torch.nn.functional.interpolate(ids, (11, 17), mode="nearest")[0, 0]
    for patch, found in enumerate(pixels_in_patches(mask, 3, 5)):
        assert found == (at_pixels[mask] == patch).sum()


def test_the_prior_falls_from_the_centre_alike_on_both_sides_of_an_image():
    """Half an image's height away weighs as much as half its width."""
    prior = centre_prior(5, 7).view(5, 7)
    assert prior[2, 3] == prior.max() == 0
    torch.testing.assert_close(prior, prior.flip(0))
    torch.testing.assert_close(prior, prior.flip(1))
    far = centre_prior(1000, 1000).view(1000, 1000)
    torch.testing.assert_close(far, far.T)


def test_the_best_head_is_the_farthest_from_chance_and_keeps_its_sign():
    head_aucs = torch.tensor([[60.0, 20.0, 50.0], [70.0, 30.0, 90.0], [65.0, 10.0, 40.0]])
    assert best_of_either_sign(head_aucs) == (1, -1)
    assert best_of_either_sign(100 - head_aucs) == (1, 1)
    assert best_head_aucs(head_aucs).tolist() == pytest.approx([80, 70, 90])


def test_an_image_has_no_part_in_the_choice_of_its_head():
    """One of two heads is right on image 0 alone. Elsewhere the other is, and counts on all."""
    head_aucs = torch.full((10, 2), 50.0)
    head_aucs[0, 0] = 100
    head_aucs[1:, 1] = 60
    assert best_of_either_sign(head_aucs[:1]) == (0, 1)
    assert best_head_aucs(head_aucs)[0] == 50


def test_heads_of_noise_stay_at_chance_where_each_images_best_would_not():
    head_aucs = 50 + 10 * torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    assert (head_aucs - 50).abs().amax(dim=1).mean() > 10
    assert abs(best_head_aucs(head_aucs).mean().item() - 50) < 1


def test_the_regression_is_at_the_largest_likelihood():
    """There the gradient, sum (P(figure) total - figure) x, is 0, but for the small penalty's."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(97, 3, generator=generator)
    figure, ground = torch.rand(2, 97, generator=generator)
    weights = fit_logistic(features, figure, ground)
    inputs = torch.cat([features, torch.ones(97, 1)], dim=1)
    expected = (figure + ground) * torch.sigmoid(inputs @ weights)
    gradient = inputs.T @ (expected - figure) / (figure + ground).sum()
    torch.testing.assert_close(gradient, -2e-4 * weights, atol=1e-5, rtol=0)


def test_the_regression_learns_from_other_images_alone():
    """Images whose objects are dark in head 0, but for image 0: its own scores are all wrong."""
    images = []
    for number in range(6):
        objects = torch.zeros(1, 4, 6, dtype=torch.bool)
        objects[0, :, number % 3 + 1] = True
        dark = torch.where(objects, 0.1, 0.9)
        if number == 0:
            dark = 1 - dark
        images.append((dark, objects, torch.zeros(4, 6, dtype=torch.bool)))
    patches = patches_of(images)
    logits = combined(patches.heads, patches).unsqueeze(1)
    assert aucs(logits, patches).flatten().tolist() == pytest.approx([0] + 5 * [100])


def test_two_heads_together_find_what_neither_finds_alone():
    """log a - log b is the object, and both carry the same noise."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for _ in range(10):
        objects = torch.rand(1, 7, 11, generator=generator) > 0.6
        noise = 3 * torch.randn(7, 11, generator=generator)
        heads = torch.stack([noise + objects[0].float(), noise]).exp()
        images.append((heads, objects, torch.zeros(7, 11, dtype=torch.bool)))
    values, _ = figure_ground_scores(patches_of(images))
    assert values["AUC, all heads"].mean() > 99
    assert values["AUC, one best head and sign"].mean() < 75
    gain = values["AUC, prior and all heads"] - values[PRIOR]
    torch.testing.assert_close(values["AUC, gain over the prior"], gain)


def test_the_bootstrap_of_a_constant_is_the_constant():
    assert bootstrap(torch.full((13,), 7.0)) == (7, 7)
    assert all(math.isnan(bound) for bound in bootstrap(torch.full((3,), torch.nan)))


def test_the_bootstrap_of_many_is_the_normal_interval_and_follows_the_seed():
    """mean -+ 1.96 deviations / sqrt(n), NaNs left out."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    low, high = bootstrap(torch.cat([values, torch.tensor([torch.nan])]))
    half = 1.96 * values.std().item() / 20
    assert low == pytest.approx(values.mean().item() - half, abs=0.02)
    assert high == pytest.approx(values.mean().item() + half, abs=0.02)
    assert bootstrap(values) == bootstrap(values) != bootstrap(values, seed=1)
