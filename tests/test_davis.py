"""DAVIS's measures J and F against hand-counted masks and the official definitions, pixel by pixel;
and its files.
"""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from evals import davis
from evals.davis import PALETTE, contour_accuracy, fraction_near, outline, region_similarity, scores


def blobs(frames: int, height: int, width: int, seed: int) -> torch.Tensor:
    """Smooth random masks that also touch the image's edges."""
    noise = torch.randn(frames, 1, 5, 7, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bicubic")[:, 0] > 0.3


def naive_outline(mask: np.ndarray) -> np.ndarray:
    """The official rule per pixel: the last row looks right only, the last column down only."""
    height, width = mask.shape
    line = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            looks = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            line[y, x] = any(mask[v, u] != mask[y, x] for v, u in looks if v < height and u < width)
    return line


def naive_f(mask: np.ndarray, truth: np.ndarray, tolerance: float = 0.008) -> float:
    """The official boundary measure by dilating both outlines with a disc."""
    radius = math.ceil(tolerance * math.hypot(*mask.shape))
    lines = [naive_outline(mask), naive_outline(truth)]
    thick = []
    for line in lines:
        grown = np.zeros_like(line)
        for y, x in np.argwhere(line):
            for v in range(max(0, y - radius), min(line.shape[0], y + radius + 1)):
                for u in range(max(0, x - radius), min(line.shape[1], x + radius + 1)):
                    grown[v, u] |= (v - y) ** 2 + (u - x) ** 2 <= radius**2
        thick.append(grown)
    if not lines[0].any() or not lines[1].any():
        return float(lines[0].any() == lines[1].any())
    precision = (lines[0] & thick[1]).sum() / lines[0].sum()
    recall = (lines[1] & thick[0]).sum() / lines[1].sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_j_is_the_hand_counted_overlap_and_1_where_both_are_empty():
    """J = |A and B| / |A or B|: 2 of 6 pixels; none of 2; nothing to find and nothing found."""
    masks = torch.zeros(3, 3, 5, dtype=torch.bool)
    truths = masks.clone()
    masks[0, 0, :4] = truths[0, 0, 2:] = truths[0, 1, 0] = masks[1, 2, 1:3] = True
    assert region_similarity(masks, truths).tolist() == [2 / 6, 0.0, 1.0]


def test_the_outline_of_one_pixel_lies_on_it_and_towards_the_origin():
    mask = torch.zeros(1, 5, 7, dtype=torch.bool)
    mask[0, 2, 3] = True
    assert outline(mask)[0].nonzero().tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]
    assert not outline(torch.ones(1, 5, 7, dtype=torch.bool)).any(), "an image's edge is no outline"


@pytest.mark.parametrize("seed", range(3))
def test_outlines_and_f_agree_with_the_official_definition(seed):
    masks, truths = blobs(5, 31, 43, seed), blobs(5, 31, 43, seed + 100)
    truths[:2] = masks[:2].roll(1, dims=2)  # near misses
    for mask, line in zip(masks, outline(masks)):
        assert np.array_equal(line, naive_outline(mask.numpy()))
    for tolerance in (0.008, 0.03, 0.1):  # radii 1, 2 and 6
        expected = [naive_f(a, b, tolerance) for a, b in zip(masks.numpy(), truths.numpy())]
        assert contour_accuracy(masks, truths, tolerance).tolist() == pytest.approx(
            expected, abs=1e-12
        )


def test_f_has_the_official_edge_cases():
    """Nothing twice: 1. Only a mask, or only an object: 0. Outlines far apart: 0. Same mask: 1."""
    empty, one, other = torch.zeros(3, 1, 37, 41, dtype=torch.bool).unbind()
    one[0, 3:9, 3:9] = other[0, 25:31, 29:37] = True
    for mask, truth, expected in (
        (empty, empty, 1),
        (one, empty, 0),
        (empty, one, 0),
        (one, other, 0),
        (one, one, 1),
    ):
        assert contour_accuracy(mask, truth).item() == expected
    assert contour_accuracy(~empty, empty).item() == 1, (
        "a mask that fills the image has no outline either"
    )


def test_the_tolerance_is_a_disc_and_reaches_8_pixels_on_davis_frames():
    """ceil(0.008 * |(480, 854)|) = 8: 8 to a side is near, (6, 6) is not, (5, 6) is."""
    assert math.ceil(0.008 * math.hypot(480, 854)) == 8
    line = torch.zeros(1, 61, 67, dtype=torch.bool)
    line[0, 30, 30] = True
    for down, right, near in (
        (0, 8, 1),
        (8, 0, 1),
        (0, 9, 0),
        (6, 6, 0),
        (5, 6, 1),
        (-5, -6, 1),
        (-8, 1, 0),
    ):
        assert fraction_near(line, line.roll((down, right), dims=(1, 2)), 8).item() == near, (
            down,
            right,
        )


def test_the_first_and_the_last_frame_are_not_scored_and_each_object_counts_once():
    """Object 1 is always right, 2 is missed in one of three scored frames, 3 (in its place) never
    stands there.
    """
    truth = torch.zeros(5, 23, 29, dtype=torch.uint8)
    truth[:, 2:9, 2:9], truth[:, 12:20, 12:20] = 1, 2
    ids = truth.clone()
    ids[0], ids[-1], ids[2, 12:20] = 0, 7, 0
    assert scores(ids, truth).tolist() == [[100, 100], pytest.approx([200 / 3, 200 / 3])]
    truth[0, 0, 0] = 3
    assert scores(ids, truth)[2].tolist() == [100, 100], (
        "an object that is gone and not claimed is right"
    )


def test_void_is_no_object_and_counts_as_ground():
    truth = torch.zeros(3, 11, 13, dtype=torch.uint8)
    truth[:, 2:5, 2:6], truth[:, 7:9] = 1, davis.VOID
    ids = torch.where(truth == 1, 1, 0).byte()
    assert scores(ids, truth).tolist() == [[100, 100]]
    ids[:, 7:9] = 1
    assert scores(ids, truth)[0, 0].item() == pytest.approx(100 * 12 / 38)


def test_the_palette_is_davis():
    assert PALETTE[:15] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128]
    assert len(PALETTE) == 768 and PALETTE[-3:] == [224, 224, 192]


def test_an_annotation_survives_writing_and_reading(tmp_path):
    """Indexed PNG, mode P, with the palette it came with and all ids up to 255."""
    ids = torch.arange(16 * 17).view(16, 17).remainder(256).byte()
    for palette in (PALETTE, list(range(255, -1, -1)) * 3):
        davis.write_annotation(tmp_path / "00000.png", ids, palette)
        read, its_palette = davis.read_annotation(tmp_path / "00000.png")
        assert torch.equal(read, ids) and its_palette == palette
        assert Image.open(tmp_path / "00000.png").mode == "P"
