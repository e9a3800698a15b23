"""Random boxes, and their crops as products of matrices, beside torchvision's."""

import pytest
import torch
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2.functional import resize

from runtime import crops


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def boxes_of(n: int, H: int, W: int, scale: tuple[float, float]) -> torch.Tensor:
    draws = torch.rand(n, 4 * crops.TRIES, generator=generator())
    return crops.random_boxes(torch.tensor([H, W]), torch.tensor(scale), draws)


@pytest.mark.parametrize("size", [224, 96, 37])
def test_crops_are_torchvisions_antialiased_bicubic_resize(size):
    """On 20 random boxes of an image with odd sides."""
    H, W = 151, 173
    image = torch.rand(3, H, W, generator=generator())
    boxes = boxes_of(20, H, W, (0.05, 1.0))
    ours = crops.crop_and_resize(image.expand(20, 3, H, W), boxes, size)
    for crop, (top, left, height, width) in zip(ours, boxes.int().tolist(), strict=True):
        cut = image[:, top : top + height, left : left + width]
        theirs = resize(cut, [size, size], InterpolationMode.BICUBIC, antialias=True)
        error = (crop - theirs.clamp(0, 1)).abs().max().item()
        assert error <= 1e-3, f"a box of {height} x {width} at {size} pixels differs by {error}"


def test_what_lies_outside_of_the_box_has_no_part_in_the_crop():
    """Images of other shapes stand in a corner of their tensor, beside zeros."""
    image = torch.rand(1, 3, 23, 19, generator=generator())
    padded = torch.zeros(1, 3, 31, 29)
    padded[:, :, :23, :19] = image
    box = torch.tensor([[0.0, 0.0, 23.0, 19.0]])
    torch.testing.assert_close(
        crops.crop_and_resize(padded, box, 13), crops.crop_and_resize(image, box, 13)
    )


@pytest.mark.parametrize(("H", "W"), [(101, 97), (61, 151), (151, 61)])
def test_boxes_lie_inside_and_obey_scale_and_ratio(H, W):
    """A side is rounded by half a pixel at most; the rest is the law."""
    low, high = 0.1, 0.3
    boxes = boxes_of(2003, H, W, (low, high))
    top, left, h, w = boxes.unbind(dim=1)
    assert torch.equal(boxes, boxes.round())
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + h <= H).all() and (left + w <= W).all()
    assert ((h + 0.5) * (w + 0.5) >= low * H * W).all()
    assert ((h - 0.5) * (w - 0.5) <= high * H * W).all()
    assert ((w + 0.5) / (h - 0.5) >= 3 / 4).all()
    assert ((w - 0.5) / (h + 0.5) <= 4 / 3).all()
    assert (top == 0).any() and (top + h == H).any(), "no box touches the border"


@pytest.mark.parametrize(("H", "W"), [(64, 64), (47, 71)])
def test_boxes_are_drawn_by_torchvisions_law(H, W):
    """Means and spreads of top, left, height and width; 2000 draws: 3 standard errors are 0.07
    of a spread.
    """
    torch.manual_seed(0)
    scale = (0.4, 1.0)
    image = torch.zeros(3, H, W)
    theirs = []
    for _ in range(2000):
        theirs.append(RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)))
    theirs = torch.tensor(theirs).float()
    ours = boxes_of(2000, H, W, scale)
    spread = theirs.std(dim=0)
    assert ((ours.mean(dim=0) - theirs.mean(dim=0)).abs() < 0.1 * spread).all()
    assert ((ours.std(dim=0) - spread).abs() < 0.1 * spread).all()


def test_where_no_box_fits_it_is_the_largest_central_one():
    """The whole area in a strip of 20 x 100: its ratio is far from allowed."""
    assert boxes_of(3, 20, 100, (1.0, 1.0)).tolist() == [[0, 36, 20, 27]] * 3
    image = torch.zeros(3, 20, 100)
    assert RandomResizedCrop.get_params(image, (1.0, 1.0), (3 / 4, 4 / 3)) == (0, 36, 20, 27)
