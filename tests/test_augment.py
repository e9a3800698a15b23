"""Each pixel operation against torchvision's, and the law by which the colours are jittered."""

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


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_the_blur_is_a_gaussian_convolution(sigma):
    taps = 2 * round(3 * sigma) + 1
    assert close(
        augment.gaussian_blur(IMAGE, sigma), TF.gaussian_blur(IMAGE, [taps, taps], [sigma, sigma])
    )


def test_the_taps_left_out_of_the_blur_are_worth_less_than_a_grey_level():
    """Between black and white, at the sigma whose taps end soonest: an edge most images lack."""
    edge = torch.zeros(1, 29, 31).index_fill(2, torch.arange(17), 1)
    for sigma in (0.16, 0.49, 0.83, 1.16, 1.49, 1.83):  # 3 sigma just below a half number
        whole = TF.gaussian_blur(edge, [25, 25], [sigma, sigma])
        assert (augment.gaussian_blur(edge, sigma) - whole).abs().max() < 1 / 255, f"sigma {sigma}"


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
