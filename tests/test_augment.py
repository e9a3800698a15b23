"""Each pixel operation against torchvision's, and the law by which the colours are jittered."""

import math

import pytest
import torch
import torchvision.transforms.functional as TF
from torchvision.transforms import ColorJitter

from runtime import augment

IMAGE = torch.rand(3, 41, 37, generator=torch.Generator().manual_seed(0))
HUNDREDTH_OF_A_GREY_LEVEL = 0.01 / 255


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return (ours - theirs).abs().max().item() < HUNDREDTH_OF_A_GREY_LEVEL


@pytest.mark.parametrize("angle", [-0.5, -0.1, 0.0, 0.07, 0.5])
def test_the_hue_turns_as_torchvision_turns_it(angle):
    grey_too = torch.cat(
        [IMAGE, torch.full((3, 2, 37), 0.3), torch.zeros(3, 1, 37), torch.ones(3, 1, 37)], dim=1
    )
    assert close(augment.hue(grey_too, angle), TF.adjust_hue(grey_too, angle))


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_brightness_contrast_and_saturation_are_torchvisions(factor):
    assert close(augment.brightness(IMAGE, factor), TF.adjust_brightness(IMAGE, factor))
    assert close(augment.contrast(IMAGE, factor), TF.adjust_contrast(IMAGE, factor))
    assert close(augment.saturation(IMAGE, factor), TF.adjust_saturation(IMAGE, factor))


def test_grey_and_solarise_are_torchvisions():
    assert close(augment.grey(IMAGE), TF.rgb_to_grayscale(IMAGE))
    assert close(augment.solarize(IMAGE), TF.solarize(IMAGE, 128 / 255))


def impulse_response(sigma: float) -> torch.Tensor:
    """What the blur makes of one bright pixel, along x: 29 weights, the pixel's own at 14."""
    point = torch.zeros(1, 29, 29)
    point[0, 14, 14] = 1
    return augment.gaussian_blur(point, sigma)[0].sum(dim=0)


@pytest.mark.parametrize("sigma", [0.1, 0.17, 0.3, 0.33, 0.5, 0.7, 1.0, 1.4, 2.0])
def test_the_blur_is_as_wide_as_it_says(sigma):
    """The standard deviation of its kernel; samples of the bell have 0 at 0.1 and 0.09 at 0.3."""
    weights, x = impulse_response(sigma).double(), torch.arange(29.0) - 14
    assert weights.sum().item() == pytest.approx(1, abs=1e-6) and weights.min() >= -1e-7
    assert (weights * x**2).sum().sqrt().item() == pytest.approx(sigma, rel=0.06)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_the_blur_s_kernel_is_the_gaussian_of_a_grid(sigma):
    """exp(-t) I_x(t), t = sigma^2 (Lindeberg 1990), by the series of the Bessel function I."""
    half = sigma**2 / 2

    def bessel(x: int) -> float:
        """Return I_x(t) = sum over k of (t / 2)^(2 k + x) / (k! (k + x)!)."""
        terms = [half ** (2 * k + x) / math.factorial(k) / math.factorial(k + x) for k in range(40)]
        return sum(terms)

    radius = math.ceil(3 * sigma)
    wanted = [bessel(abs(x)) for x in range(-radius, radius + 1)]
    found = impulse_response(sigma)[14 - radius : 15 + radius]
    for here, there in zip(found.tolist(), wanted, strict=True):
        assert here == pytest.approx(there / sum(wanted), abs=1e-6)


def test_a_wide_blur_is_a_gaussian_convolution():
    """On an image, as torchvision samples the bell: the two differ by a grey level or two."""
    theirs = TF.gaussian_blur(IMAGE, [13, 13], [2.0, 2.0])
    assert (augment.gaussian_blur(IMAGE, 2.0) - theirs).abs().max() < 3 / 255


def test_the_taps_left_out_of_the_blur_are_worth_less_than_a_grey_level():
    """Between black and white, on one side of an edge, at the sigmas whose taps end soonest."""
    for sigma in (0.16, 0.33, 0.66, 1.0, 1.33, 1.66, 2.0):  # 3 sigma at or below a whole number
        whole = torch.fft.ifft((sigma**2 * (augment.GRID_WAVES.cos() - 1)).exp()).real
        left_out = whole[math.ceil(3 * sigma) + 1 : 17].sum().item()
        assert left_out < 1 / 255, f"sigma {sigma}"


def test_the_blur_works_on_crops_smaller_than_its_kernel():
    assert augment.gaussian_blur(IMAGE[:, :3, :3], 2.0).shape == (3, 3, 3)


def test_colour_jitter_is_drawn_by_the_law_of_torchvision():
    """Order, factors and angle: the mean and the spread of what comes of one colour beside another
    one.
    """
    torch.manual_seed(0)
    colours = torch.tensor([[0.9, 0.2], [0.4, 0.3], [0.1, 0.8]]).view(3, 1, 2)
    theirs = ColorJitter(0.4, 0.4, 0.2, 0.1)
    ours = torch.stack([augment.color_jitter(colours, (0.4, 0.4, 0.2, 0.1)) for _ in range(2000)])
    theirs = torch.stack([theirs(colours) for _ in range(2000)])
    for moment in (torch.mean, torch.std):
        error = (moment(ours, dim=0) - moment(theirs, dim=0)).abs().max().item()
        assert error < 0.01, f"the {moment.__name__} differs by {error}"


@pytest.mark.parametrize(
    "operation",
    [
        augment.solarize,
        augment.grey,
        lambda image: augment.gaussian_blur(image, 1.1),
        lambda image: augment.color_jitter(image, (0.4, 0.4, 0.2, 0.1)),
    ],
)
def test_no_operation_changes_the_image_that_it_is_given(operation):
    image = IMAGE.clone()
    operation(image)
    assert torch.equal(image, IMAGE)
