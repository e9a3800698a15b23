"""Each pixel operation against torchvision's, and the law by which the colours are jittered."""

import math

import pytest
import torch
import torchvision.transforms.functional as TF
from torchvision.transforms import ColorJitter

from runtime import augment

IMAGES = torch.rand(5, 3, 41, 37, generator=torch.Generator().manual_seed(0))
HUNDREDTH_OF_A_GREY_LEVEL = 0.01 / 255


def close(ours: torch.Tensor, theirs: list[torch.Tensor]) -> bool:
    """Whether a batch is what torchvision makes of the images one by one."""
    return (ours - torch.stack(theirs)).abs().max().item() < HUNDREDTH_OF_A_GREY_LEVEL


def test_the_hue_turns_as_torchvision_turns_it():
    greys = torch.cat([torch.full((3, 2, 37), 0.3), torch.zeros(3, 1, 37), torch.ones(3, 1, 37)], 1)
    images = torch.cat([IMAGES, greys.expand(5, -1, -1, -1)], dim=2)
    angles = [-0.5, -0.1, 0.0, 0.07, 0.5]
    ours = augment.hue(images, torch.tensor(angles))
    assert close(ours, [TF.adjust_hue(*pair) for pair in zip(images, angles)])


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_brightness_contrast_and_saturation_are_torchvisions(name):
    factors = [0.6, 1.0, 1.4, 0.0, 1.9]
    ours = getattr(augment, name)(IMAGES, torch.tensor(factors))
    adjust = getattr(TF, f"adjust_{name}")
    assert close(ours, [adjust(*pair) for pair in zip(IMAGES, factors)])


def test_grey_flip_and_solarise_are_torchvisions():
    assert close(augment.grey(IMAGES), [TF.rgb_to_grayscale(image) for image in IMAGES])
    assert close(augment.flip(IMAGES), [TF.hflip(image) for image in IMAGES])
    assert close(augment.solarize(IMAGES), [TF.solarize(image, 128 / 255) for image in IMAGES])


SIGMAS = [0.1, 0.17, 0.3, 0.33, 0.5, 0.7, 1.0, 1.4, 2.0]


def impulse_responses() -> list[torch.Tensor]:
    """What the blurs make of one bright pixel, along x: 29 weights, the pixel's own at 14."""
    points = torch.zeros(len(SIGMAS), 1, 29, 29)
    points[:, 0, 14, 14] = 1
    blurred = augment.gaussian_blur(points, torch.tensor(SIGMAS))
    return list(blurred[:, 0].sum(dim=1))


def test_the_blur_is_as_wide_as_it_says():
    """The standard deviation of its kernel; samples of the bell have 0 at 0.1 and 0.09 at 0.3.

    Each image of the batch has a sigma of its own.
    """
    x = torch.arange(29.0) - 14
    for sigma, weights in zip(SIGMAS, impulse_responses(), strict=True):
        assert weights.sum().item() == pytest.approx(1, abs=1e-6) and weights.min() >= -1e-7
        deviation = (weights.double() * x**2).sum().sqrt().item()
        assert deviation == pytest.approx(sigma, rel=0.06)


def test_the_blur_s_kernel_is_the_gaussian_of_a_grid():
    """exp(-t) I_x(t), t = sigma^2 (Lindeberg 1990), by the series of the Bessel function I."""
    for sigma, weights in zip(SIGMAS, impulse_responses(), strict=True):
        half = sigma**2 / 2
        radius = math.ceil(3 * sigma)
        wanted = []
        for x in range(-radius, radius + 1):
            # I_x(t) = sum over k of (t / 2)^(2 k + x) / (k! (k + x)!)
            x = abs(x)
            terms = []
            for k in range(40):
                terms.append(half ** (2 * k + x) / math.factorial(k) / math.factorial(k + x))
            wanted.append(sum(terms))
        found = weights[14 - radius : 15 + radius]
        for here, there in zip(found.tolist(), wanted, strict=True):
            assert here == pytest.approx(there / sum(wanted), abs=1e-6)


def test_a_wide_blur_is_a_gaussian_convolution():
    """On an image, as torchvision samples the bell: the two differ by a grey level or two."""
    theirs = TF.gaussian_blur(IMAGES, [13, 13], [2.0, 2.0])
    ours = augment.gaussian_blur(IMAGES, torch.full((5,), 2.0))
    assert (ours - theirs).abs().max() < 3 / 255


def test_the_taps_left_out_of_the_blur_are_worth_less_than_a_grey_level():
    """Between black and white, on one side of an edge, at the sigmas whose taps end soonest."""
    for sigma in (0.16, 0.33, 0.66, 1.0, 1.33, 1.66, 2.0):  # 3 sigma at or below a whole number
        whole = torch.fft.ifft((sigma**2 * (augment.GRID_WAVES.cos() - 1)).exp()).real
        left_out = whole[math.ceil(3 * sigma) + 1 : 17].sum().item()
        assert left_out < 1 / 255, f"sigma {sigma}"


def test_the_blur_works_on_crops_smaller_than_its_kernel():
    small = IMAGES[:, :, :3, :3]
    assert augment.gaussian_blur(small, torch.full((5,), 2.0)).shape == (5, 3, 3, 3)


def test_colour_jitter_is_drawn_by_the_law_of_torchvision():
    """Order, factors and angle: the mean and the spread of what comes of one colour beside another
    one.
    """
    torch.manual_seed(0)
    colours = torch.tensor([[0.9, 0.2], [0.4, 0.3], [0.1, 0.8]]).view(3, 1, 2)
    strengths = (0.4, 0.4, 0.2, 0.1)
    low, high = augment.jitter_range(strengths)
    order = torch.rand(2000, 4).argsort(dim=1)
    amounts = low + (high - low) * torch.rand(2000, 4)
    batch = colours.repeat(2000, 1, 1, 1)
    ours = augment.color_jitter(batch, list(range(2000)), order, amounts)
    theirs = torch.stack([ColorJitter(*strengths)(colours) for _ in range(2000)])
    for moment in (torch.mean, torch.std):
        error = (moment(ours, dim=0) - moment(theirs, dim=0)).abs().max().item()
        assert error < 0.01, f"the {moment.__name__} differs by {error}"


def test_each_image_is_jittered_in_its_own_order():
    """Brightness, then contrast, is not contrast, then brightness; others stay as they are."""
    order = torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3], [0, 1, 2, 3]])
    amounts = torch.tensor([1.3, 0.6, 1.0, 0.0]).expand(3, 4)
    images = IMAGES[:1].repeat(3, 1, 1, 1)
    first, second, left = augment.color_jitter(images.clone(), [0, 1], order, amounts)
    theirs = TF.adjust_contrast(TF.adjust_brightness(IMAGES[0], 1.3), 0.6)
    torch.testing.assert_close(first, theirs, atol=1e-5, rtol=0)
    theirs = TF.adjust_brightness(TF.adjust_contrast(IMAGES[0], 0.6), 1.3)
    torch.testing.assert_close(second, theirs, atol=1e-5, rtol=0)
    assert torch.equal(left, IMAGES[0])


@pytest.mark.parametrize("which", [[], [1, 4], [0, 1, 2, 3, 4]])
def test_only_the_chosen_images_change_each_by_its_own_amount(which):
    factors = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    changed = augment.apply_to(IMAGES.clone(), which, augment.brightness, factors)
    for number, (image, factor) in enumerate(zip(IMAGES, factors)):
        wanted = image * factor if number in which else image
        torch.testing.assert_close(changed[number], wanted)


AMOUNT = torch.full((5,), 0.7)


@pytest.mark.parametrize(
    "operation",
    [
        augment.solarize,
        augment.grey,
        lambda images: augment.gaussian_blur(images, AMOUNT),
        lambda images: augment.hue(images, AMOUNT / 2),
        lambda images: augment.contrast(images, AMOUNT),
    ],
)
def test_no_operation_changes_the_images_that_it_is_given(operation):
    images = IMAGES.clone()
    operation(images)
    assert torch.equal(images, IMAGES)
