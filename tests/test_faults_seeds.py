"""What is bitwise equal and what is not; seeds of images, epochs, steps and processes do not
collide.
"""

from itertools import product
from pathlib import Path

import pytest
import torch
from killing import start, start_ranks, status_of
from test_faults_kills import assert_same, command, write_hard_photos
from test_runs import equal

from runtime.sampling import seed_of
from training.checkpoint import read_checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.slow]


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (2**31, 799)])
def test_no_two_images_of_imagenet_share_a_seed_in_an_epoch(seed, epoch):
    """1.3 million seeds below 2^32, drawn by chance, would give some 200 pairs."""
    seeds = {seed_of(seed, epoch, index) for index in range(1_281_167)}
    assert len(seeds) == 1_281_167, (
        f"{1_281_167 - len(seeds)} images get the crops of another's draw"
    )


def test_no_two_processes_or_steps_share_a_seed():
    """Of the dropped paths: 64 processes, 10,000 steps, and those of neighbouring runs."""
    for seed in (0, 1, 12345):
        seeds = {seed_of(seed, step, rank) for step, rank in product(range(10_000), range(64))}
        assert len(seeds) == 640_000
    runs = {seed_of(*numbers) for numbers in product(range(31), range(29), range(7), range(64))}
    pairs = 31 * 29 * 7 * 64
    assert pairs - len(runs) <= 2 * pairs**2 / 2**33 + 7, "no more collisions than chance makes"


def test_seeds_that_stand_side_by_side_draw_unlike_numbers():
    """Of neighbouring images the first draw is uniform, and knows nothing of its neighbour's."""
    draws = torch.stack(
        [
            torch.rand(2, generator=torch.Generator().manual_seed(seed_of(0, 0, index)))
            for index in range(20_000)
        ]
    )
    assert (draws.mean(dim=0) - 0.5).abs().max() < 0.01
    assert torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0]]))[0, 1].abs() < 0.03


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_hard_photos(tmp_path_factory.mktemp("photos"))


def test_equal_processes_give_equal_bits_and_others_nearly_the_same(photos, tmp_path):
    """One process twice, with and without workers; two processes twice; two against one: equal but
    for rounding.
    """
    slowly = (
        "--lr",
        "0.0005",
        "--momentum_teacher",
        "0.996",
    )  # training makes the differences larger
    for name, more in (("one", ()), ("again", ("--num_workers", "2"))):
        flags = [*command(photos, tmp_path / name), *slowly, *more]
        assert status_of(start(flags, tmp_path / f"said {name}")) == 0, (
            tmp_path / f"said {name}"
        ).read_text()
    assert_same(tmp_path / "again", tmp_path / "one")
    for name in ("two", "two again"):
        flags = [*command(photos, tmp_path / name), *slowly, "--batch_size_per_gpu", "2"]
        assert [status_of(rank) for rank in start_ranks(flags, tmp_path, {})] == [0, 0]
    assert_same(tmp_path / "two again", tmp_path / "two")
    one, two = (read_checkpoint(tmp_path / name / "checkpoint0002.pth") for name in ("one", "two"))
    assert not equal(one["teacher"], two["teacher"]), (
        "sums in another order round otherwise: if this is equal now, say so in docs/running.md"
    )
    torch.testing.assert_close(
        one["dino_loss"]["center"], two["dino_loss"]["center"], atol=2e-3, rtol=0
    )
    for name, value in one["student"].items():
        torch.testing.assert_close(
            two["student"][name], value, atol=2e-3, rtol=0, msg=f"{name} of the students"
        )
