"""Multi-crop: the law of the augmentations, one pass per resolution."""

import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import nn

from multicrop import MultiCrop, MultiCropNetwork, forward_crops
from runtime.augment import grey
from runtime.creatures import make_creatures

IMAGE = torch.rand(3, 41, 37, generator=torch.Generator().manual_seed(0))


def test_views_are_two_globals_then_the_locals():
    views = MultiCrop(global_size=35, local_size=14, local_number=3)(Image.new("L", (61, 53), 90))
    assert [tuple(view.shape) for view in views] == [(3, 35, 35)] * 2 + [(3, 14, 14)] * 3
    assert all(view.dtype == torch.float32 and view.is_contiguous() for view in views)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_views_are_contiguous_whatever_the_layout_of_the_image(layout):
    """The whole image is a box too, and then the resize keeps its layout; grey and blur have
    layouts of their own.
    """
    torch.manual_seed(0)
    image = (IMAGE * 255).byte()[None, :, :37].contiguous(memory_format=layout)[0]
    crop = MultiCrop(37, 37, (1, 1), (1, 1), 10, blur=(0.5, 0.5, 0.5), solarize=0.5)
    assert all(
        view.is_contiguous() and view.shape == (3, 37, 37) for _ in range(5) for view in crop(image)
    )


def test_a_tensor_and_a_image_give_the_same_views():
    """And a tensor gives the same in both layouts: colours apart, or side by side as the decoder
    leaves them.
    """
    pixels = (IMAGE * 255).byte()
    torch.manual_seed(3)
    from_tensor = MultiCrop(35, 14)(pixels)
    torch.manual_seed(3)
    from_image = MultiCrop(35, 14)(TF.to_pil_image(pixels))
    for ours, theirs in zip(from_tensor, from_image, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_views_are_normalised_by_mean_and_std():
    image = torch.full((3, 50, 50), 128, dtype=torch.uint8)
    plain = MultiCrop(
        20, 10, jitter=(0, 0, 0, 0), solarize=0, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3)
    )
    expected = (128 / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.1, 0.2, 0.3])
    gen_grey = grey(torch.full((1, 3, 1, 1), 128 / 255)).item()
    for view in plain(image):
        was_greyed = abs(view[0, 0, 0].item() * 0.1 + 0.5 - gen_grey) < 1e-6
        wanted = (
            (gen_grey - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.1, 0.2, 0.3])
            if was_greyed
            else expected
        )
        torch.testing.assert_close(view, wanted.view(3, 1, 1).expand_as(view), atol=1e-4, rtol=1e-4)


def fraction(happened: list[bool]) -> float:
    return sum(happened) / len(happened)


def test_the_chances_of_the_augmentations_are_the_papers():
    """On an image of which each augmentation leaves a mark of its own; 1500 draws: 3 standard
    errors are 0.04.
    """
    torch.manual_seed(0)
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[0, :, ::2], stripes[1, :, 32:] = 200, 100
    still = {
        "jitter": (0, 0, 0, 0),
        "mean": (0, 0, 0),
        "std": (1, 1, 1),
        "global_scale": (1, 1),
        "local_scale": (1, 1),
        "global_size": 64,
        "local_size": 64,
        "local_number": 1,
    }
    views = [MultiCrop(**still, blur=(0, 0, 0), solarize=0.2)(stripes) for _ in range(1500)]
    greyed = [bool((view[0] - view[1]).abs().max() < 1e-3) for one in views for view in one]
    assert fraction(greyed) == pytest.approx(0.2, abs=0.04)
    for number, expected in enumerate((0.0, 0.2, 0.0)):
        coloured = [one[number] for one in views if not one[number][0].eq(one[number][1]).all()]
        solarized = [bool(view[0].amax() < 0.5) for view in coloured]
        assert fraction(solarized) == pytest.approx(expected, abs=0.04), (
            f"solarise on view {number}"
        )
    views = [MultiCrop(**still, solarize=0)(stripes) for _ in range(1500)]
    for number, expected in enumerate((1.0, 0.1, 0.5)):
        coloured = [one[number][0] for one in views if not one[number][0].eq(one[number][1]).all()]
        blurred = fraction(
            [bool((red[:, 1:] - red[:, :-1]).abs().amax() < 0.75) for red in coloured]
        )
        visible = 0.97 * expected  # a sigma below 0.15 pixels leaves the stripes as they are
        assert blurred == pytest.approx(visible, abs=0.05), f"blur on view {number}"


def test_half_of_the_views_are_flipped():
    torch.manual_seed(0)
    ramp = torch.arange(64, dtype=torch.uint8).mul(3).expand(3, 64, 64).contiguous()
    crop = MultiCrop(64, 64, local_number=0, blur=(0, 0, 0), solarize=0, jitter=(0, 0, 0, 0))
    flipped = [bool(view[0, 0, 0] > view[0, 0, -1]) for _ in range(500) for view in crop(ramp)]
    assert fraction(flipped) == pytest.approx(0.5, abs=0.05)


def test_crops_cover_areas_within_their_scale():
    """An image whose pixels hold their own coordinates tells which box a view was cut from."""
    torch.manual_seed(0)
    across = torch.linspace(0, 255, 256).round().byte().expand(256, 256)
    image = torch.stack([across, across.T, torch.zeros_like(across)])
    crop = MultiCrop(
        64, 32, (0.4, 1.0), (0.05, 0.4), 4, (0, 0, 0), (1, 1, 1), (0, 0, 0, 0), (0, 0, 0), 0
    )
    areas = [[], []]
    for _ in range(200):
        for number, view in enumerate(crop(image)):
            if view[2].max() == 0:  # not grey
                width, height = (view[i].amax() - view[i].amin() for i in (0, 1))
                areas[number >= 2].append((width * height).item())
    assert 0.33 < min(areas[0]) and max(areas[0]) <= 1.0 and max(areas[0]) > 0.9
    assert 0.03 < min(areas[1]) < 0.1 and 0.3 < max(areas[1]) < 0.42


def test_views_of_a_batch_are_those_of_its_images():
    """From the same draws; bytes are rounded and cut at 0 and 255 between the two axes.

    Without what makes a difference of some levels larger.
    """
    images = make_creatures(5, side=41).images
    sides = torch.tensor([[41, 41], [29, 41], [41, 17], [31, 31], [37, 23]])
    crop = MultiCrop(
        23, 13, local_number=3, mean=(0, 0, 0), std=(1, 1, 1), jitter=(0, 0, 0, 0), solarize=0
    )
    one_by_one, draws = [], []
    for seed, (image, (height, width)) in enumerate(zip(images, sides.tolist())):
        torch.manual_seed(seed)
        one_by_one.append(crop(image[:, :height, :width]))
        torch.manual_seed(seed)
        draws.append(crop.draw())
    together = crop.batch_views(images, sides, torch.stack(draws))
    assert len(together) == 5
    for number, views in enumerate(together):
        theirs = torch.stack([one[number] for one in one_by_one])
        levels = 255 * (views - theirs).abs()
        assert levels.mean() < 0.4 and levels.max() < 16, (
            f"view {number} differs by {levels.mean():.2f} levels, {levels.max():.1f} at most"
        )


class CountingBackbone(nn.Module):
    calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return images.mean(dim=(2, 3))


def test_one_backbone_pass_per_resolution_keeps_the_order_of_the_views():
    """And one pass of the head, whose batch normalisation, where it has one, is over all views."""
    backbone, head, head_passes = CountingBackbone(), nn.Linear(3, 7), []
    head.register_forward_hook(lambda *_: head_passes.append(1))
    crops = [torch.randn(5, 3, size, size) for size in (20, 20, 11, 11, 11)]
    logits = forward_crops(backbone, head, crops)
    assert backbone.calls == 2, (
        f"crops of two sizes need two passes of the backbone, not {backbone.calls}"
    )
    assert len(head_passes) == 1, (
        f"the head needs all views in one pass, not in {len(head_passes)}: a batch "
        "normalisation in it is over all of them"
    )
    assert logits.shape == (5 * 5, 7), "the logits of all views stand below each other: (V * B, K)"
    torch.testing.assert_close(
        logits,
        torch.cat([head(crop.mean(dim=(2, 3))) for crop in crops]),
        msg="the views must stay in their order: the loss takes the first two for the globals",
    )
    torch.testing.assert_close(MultiCropNetwork(backbone, head)(crops), logits)
    assert forward_crops(backbone, head, crops[:2]).shape == (2 * 5, 7), (
        "the teacher gets two globals, and no locals"
    )
