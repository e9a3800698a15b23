"""The embedded images: drawn from a seed, with masks, and with classes that cannot be read off the
colours.
"""

import torch

from features import knn_votes, nearest_neighbours, top_accuracy
from runtime.creatures import CLASSES, make_creatures


def test_images_labels_and_masks_belong_together():
    drawn = make_creatures(40, side=32)
    assert drawn.images.shape == (40, 3, 32, 32) and drawn.images.dtype == torch.uint8
    assert drawn.labels.tolist() == [i % len(CLASSES) for i in range(40)]
    assert drawn.masks.shape == (40, 32, 32) and drawn.masks.dtype == torch.bool
    share = drawn.masks.float().mean(dim=(1, 2))
    assert 0.08 < share.min() and share.max() < 0.4, (
        "each image shows one object, neither lost nor filling it"
    )


def test_the_same_seed_draws_the_same_images_and_another_others():
    first, again, other = make_creatures(20), make_creatures(20), make_creatures(20, seed=1)
    assert torch.equal(first.images, again.images) and torch.equal(first.masks, again.masks)
    assert not torch.equal(first.images, other.images)


def test_the_mask_is_where_the_object_is():
    """Inside the mask the colours are saturated, the ground is nearly grey."""
    drawn = make_creatures(50)
    chroma = (drawn.images.amax(dim=1).float() - drawn.images.amin(dim=1).float()) / 255
    assert chroma[drawn.masks].mean() > 2 * chroma[~drawn.masks].mean()


def test_a_colour_histogram_does_not_tell_the_classes():
    """k-NN of 6 x 6 x 6 histograms with the demo's number of voters; chance is 10 %."""
    drawn = make_creatures(2000)
    cell = (
        (drawn.images.long() * 6 // 256 * torch.tensor([36, 6, 1]).view(3, 1, 1))
        .sum(dim=1)
        .flatten(1)
    )
    histograms = torch.zeros(2000, 216).scatter_add_(1, cell, torch.ones(cell.shape)).sqrt()
    cosines, nearest = nearest_neighbours(histograms[:1000], histograms[1000:], 20)
    votes = knn_votes(cosines, drawn.labels[:1000][nearest], len(CLASSES))
    share = top_accuracy(votes, drawn.labels[1000:])
    assert share < 14, f"{share:.1f} % are told by their colours alone, 10 would be chance"
