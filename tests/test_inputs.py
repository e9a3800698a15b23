"""What a training reads: images kept in memory, or a loader's."""

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

import train
from data import Images, open_images
from features import EvaluationView
from runtime import hardware
from runtime.creatures import make_creatures
from runtime.hardware import World, free_memory
from runtime.sampling import CropsInMemory, CropsOnDevice
from settings import Settings, parse_settings
from training.inputs import (
    advice,
    device_crops,
    fits_in_memory,
    make_loader,
    make_multicrop,
    stored,
    views_in_memory,
)

ALONE = World(0, 1, torch.device("cpu"), torch.float32)
SHAPES = [(41, 29), (13, 17), (23, 46)]


@pytest.fixture
def folder(tmp_path):
    for i, (height, width) in enumerate(SHAPES):
        image = make_creatures(1, side=47, seed=i).images[0]
        to_pil_image(image[:, :height, :width]).save(tmp_path / f"{i}.png")
    return tmp_path


def test_images_of_any_shape_are_stored_as_they_are_or_shrunk(folder):
    images, _ = open_images(str(folder))
    pixels, sides = stored(images, side=23)
    assert sides.tolist() == [[23, 16], [13, 17], [12, 23]]
    assert pixels.shape == (3, 3, 23, 23) and pixels.dtype == torch.uint8
    small, _ = images[1]
    assert torch.equal(pixels[1, :, :13, :17], small), "a small image is no other one"
    assert not pixels[1, :, 13:].any() and not pixels[1, :, :, 17:].any()


def test_images_that_are_in_memory_stay_as_they_are():
    images = Images(make_creatures(5, side=19).images)
    pixels, sides = stored(images, side=8)
    assert pixels is images.source and sides.tolist() == [[19, 19]] * 5


def test_centres_in_memory_are_seen_as_the_files_are(folder):
    """Bit for bit, so k-NN does not change where images are read once."""
    images, _ = open_images(str(folder))
    images.labels = torch.tensor([2, 0, 1])
    view = EvaluationView(16, 0.8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    (train, test), whole = views_in_memory((images, images.subset(torch.tensor([2]))), view)
    assert train.source.shape == (3, 3, 16, 16) and train.labels.tolist() == [2, 0, 1]
    for kept, image in zip(train.source, range(3)):
        assert torch.equal(whole(kept), view(images[image][0]))
    assert torch.equal(test.source[0], train.source[2])


def test_what_fits_is_kept_and_what_does_not_is_loaded():
    a_quarter = free_memory(ALONE.device) / 4
    assert a_quarter > 2**20, "a MiB at least is free here"
    most = int(a_quarter / (3 * 64**2))
    assert fits_in_memory(int(0.9 * most), 64, "auto", ALONE)
    assert not fits_in_memory(int(1.1 * most), 64, "auto", ALONE)
    assert fits_in_memory(10**9, 64, "true", ALONE)
    assert not fits_in_memory(1, 64, "false", ALONE)


@pytest.mark.parametrize("wanted", ["true", "false"])
def test_a_folder_is_kept_in_memory_or_loaded_by_workers(wanted, folder):
    flags = "--preset demo --batch_size_per_gpu 3 --num_workers 0 --in_memory".split()
    settings = parse_settings([*flags, wanted])
    images, _ = open_images(str(folder))
    loader, batches = make_loader(images, settings, ALONE)
    assert isinstance(loader, CropsInMemory) == (wanted == "true")
    (views,) = list(loader)
    assert [len(view) for view in views] == [3] * len(views) and batches.steps == 1


@pytest.mark.usefixtures("no_report")
def test_a_run_keeps_where_its_images_are(folder, tmp_path, monkeypatch, capsys):
    """Shrunk images have other crops, so a continued run must not choose anew."""
    flags = (
        "--preset demo --batch_size_per_gpu 3 --num_workers 0 --warmup_epochs 0 --device cpu "
        "--warmup_teacher_temp_epochs 0 --knn_every 0 --precision fp32"
    ).split()
    flags += ["--data_path", str(folder), "--output_dir", str(tmp_path / "run")]
    for memory, epochs in ((0.0, "1"), (1e12, "2")):
        monkeypatch.setattr(hardware, "free_memory", lambda device, memory=memory: memory)
        train.main([*flags, "--epochs", epochs])
        assert "kept in memory" not in capsys.readouterr().out
    args = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["args"]
    assert args["in_memory"] == "false"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_crops_of_a_loaders_bytes_are_those_of_images_in_memory(workers, folder):
    """What a GPU does with files that do not fit, here on the CPU; one image is shrunk."""
    flags = "--preset demo --batch_size_per_gpu 3 --global_crops_size 16 --local_crops_size 8"
    flags += f" --in_memory true --num_workers {workers} --seed 5"
    settings = parse_settings(flags.split())
    images, _ = open_images(str(folder))
    in_memory, batches = make_loader(images, settings, ALONE)
    multicrop = make_multicrop(settings)
    loaded = device_crops(images, multicrop, batches, 32, settings, ALONE)
    assert loaded.num_workers == int(workers)
    for epoch in (0, 3):
        batches.epoch = epoch
        (ours,) = list(loaded)
        (theirs,) = list(in_memory)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_gpu_crops_files_that_do_not_fit(folder):
    """And a CPU leaves that to its workers."""
    flags = "--preset demo --batch_size_per_gpu 3 --num_workers 0 --in_memory false"
    settings = parse_settings(flags.split())
    images, _ = open_images(str(folder))
    gpu = World(0, 1, torch.device("cuda"), torch.float32)
    assert isinstance(make_loader(images, settings, gpu)[0], CropsOnDevice)
    assert not isinstance(make_loader(images, settings, ALONE)[0], CropsOnDevice)


@pytest.mark.parametrize("preset", ["photos", "vits16", "small", "demo"])
@pytest.mark.parametrize("number", [1999, 2000])
def test_a_line_says_the_recipe_for_few_images_and_what_to_expect_of_very_few(preset, number):
    said = "\n".join(advice(number, Settings(preset=preset)))
    assert ("--preset vits16" in said) == (preset == "photos")
    assert ("1999 images are few" in said) == (preset != "demo" and number < 2000)


def test_a_line_says_which_recipe_the_authors_weights_are_trained_on_by():
    settings = Settings(preset="vits16", init_from="dino_vits16")
    (line,) = advice(60, settings)
    assert line.startswith("--preset vits16, the paper's recipe")


@pytest.mark.parametrize(("number", "passes"), [(4, 25), (60, 2), (70, 1), (1000, 1)])
def test_a_small_folder_is_gone_over_several_times_in_an_epoch(number, passes):
    images = Images(torch.zeros(number, 3, 9, 9, dtype=torch.uint8))
    settings = Settings(epoch_images=100, batch_size_per_gpu=2)
    _, batches = make_loader(images, settings, ALONE)
    assert batches.passes == passes
    assert batches.steps == passes * number // 2
