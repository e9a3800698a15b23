"""Crops and batches are functions of (seed, epoch, image), however the work is shared or
interrupted.
"""

import torch

from data import Images
from multicrop import MultiCrop
from runtime.creatures import make_creatures
from runtime.sampling import CropsDataset, CropsInMemory, EpochBatches, seed_of


def crops_of(epoch: int, index: int, seed: int = 0) -> torch.Tensor:
    images = Images(
        torch.randint(0, 256, (7, 3, 40, 40), generator=torch.Generator().manual_seed(1)).byte()
    )
    return torch.cat(
        [view.flatten() for view in CropsDataset(images, MultiCrop(16, 8), seed)[epoch, index]]
    )


def test_crops_depend_on_seed_epoch_and_image_and_on_nothing_else():
    first = crops_of(2, 3)
    torch.rand(100)
    assert torch.equal(first, crops_of(2, 3))
    for other in (crops_of(3, 3), crops_of(2, 4), crops_of(2, 3, seed=1)):
        assert not torch.equal(first, other)


def test_crops_of_images_in_memory_are_those_of_the_loader():
    """The same images in the same steps, from the same draws, whatever the number of processes."""
    images = Images(make_creatures(29, side=24).images)
    crop = MultiCrop(16, 8, local_number=1, jitter=(0, 0, 0, 0))
    batches = EpochBatches(29, 7, 1, rank=1, world_size=2, seed=3)
    batches.epoch = 5
    batches.first_step = 1
    sides = torch.tensor([[24, 24]] * 29)
    dataset = CropsDataset(images, crop, seed=3)
    in_memory = CropsInMemory(images.source, sides, crop, batches, seed=3)
    steps = 0
    for keys, views in zip(batches, in_memory, strict=True):
        one_by_one = [dataset[key] for key in keys]
        for ours, theirs in zip(views, zip(*one_by_one, strict=True), strict=True):
            # levels are rounded otherwise; another image or box would differ by far more
            difference = (ours - torch.stack(theirs)).abs().mean().item()
            assert difference < 0.02, f"the views differ by {difference}"
        steps += 1
    assert steps == len(batches) == 1


def batches_of(
    world_size: int, batch_size: int, accumulate: int = 1, epoch: int = 0, first_step: int = 0
):
    steps: dict[int, set] = {}
    for rank in range(world_size):
        batches = EpochBatches(101, batch_size, accumulate, rank, world_size, seed=5)
        batches.epoch, batches.first_step = epoch, first_step
        for i, batch in enumerate(batches):
            steps.setdefault(first_step + i // accumulate, []).extend(batch)
    return {step: sorted(batch) for step, batch in steps.items()}


def test_a_step_takes_the_same_images_however_they_are_shared():
    alone = batches_of(1, 12)
    assert (
        alone
        == batches_of(2, 6)
        == batches_of(3, 4)
        == batches_of(1, 4, accumulate=3)
        == batches_of(2, 3, 2)
    )
    assert len(alone) == 8 and len({key for batch in alone.values() for key in batch}) == 96


def test_an_epoch_goes_on_in_its_middle_and_the_next_has_another_order():
    assert batches_of(1, 12, first_step=3) == {
        step: batch for step, batch in batches_of(1, 12).items() if step >= 3
    }
    orders = [
        [index for batch in batches_of(1, 12, epoch=epoch).values() for _, index in batch]
        for epoch in (0, 1)
    ]
    assert orders[0] != orders[1]


def test_an_epoch_of_several_passes_sees_each_image_as_often_with_other_crops():
    """Each pass has its own order and its own number in the keys, which seed the crops; the next
    epoch goes on counting."""
    keys = []
    for epoch in range(2):
        batches = EpochBatches(11, 5, 1, rank=0, world_size=1, seed=3, passes=3)
        batches.epoch = epoch
        keys += [key for batch in batches for key in batch]
    assert len(keys) == 2 * 30, "3 x 11 images are six steps of 5; the last three are dropped"
    assert len(set(keys)) == len(keys)
    passes = [[index for number, index in keys if number == turn] for turn in range(6)]
    for turn in (0, 1, 3, 4):  # the third of an epoch is dropped in part
        assert sorted(passes[turn]) == list(range(11))
    assert passes[0] != passes[1]


def test_one_pass_is_the_order_that_runs_had_before_there_were_several():
    batches = EpochBatches(101, 101, 1, rank=0, world_size=1, seed=5)
    batches.epoch = 2
    order = torch.randperm(101, generator=torch.Generator().manual_seed(seed_of(5, 2)))
    assert next(iter(batches)) == [(2, index) for index in order.tolist()]
