"""Images from anywhere: every mode of Pillow, every layout of folders, what cannot be read."""

import numpy as np
import pytest
import torch
from PIL import Image

import data
from runtime.commandline import InputError


def save(path, image: Image.Image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def noise(seed: int = 0, size=(11, 7)) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )


@pytest.mark.parametrize("mode", "1 L P LA RGBA CMYK YCbCr HSV LAB PA RGBa RGBX".split())
def test_every_mode_becomes_rgb(mode):
    source = noise()
    between = {"RGBa": "RGBA", "PA": "P"}.get(mode, mode)
    image = (
        Image.merge("LAB", source.split())
        if mode == "LAB"
        else source.convert(between).convert(mode)
    )
    rgb = data.to_rgb(image)
    assert rgb.mode == "RGB" and rgb.size == (11, 7)
    if mode in ("RGBA", "RGBX"):
        assert rgb.tobytes() == source.tobytes()


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_16_bit_and_float_grey_keep_their_shades(dtype, tmp_path):
    ramp = np.linspace(0, 1, 77).reshape(7, 11)
    values = ramp.astype("float32") if dtype == "float32" else (ramp * 65535).astype(dtype)
    file = save(tmp_path / "grey.tiff", Image.fromarray(values))
    np.testing.assert_allclose(data.decode(file).numpy()[1], ramp * 255, atol=1)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
def test_exif_rotation_is_applied(kind, mode, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    image = noise(size=(11, 7)).convert(mode)
    file = save(tmp_path / f"turned.{kind}", image, exif=exif, lossless=True)
    upright = save(tmp_path / "upright.png", image.rotate(-90, expand=True))
    assert data.decode(file).shape == (3, 11, 7)
    assert torch.equal(data.decode(file), data.decode(upright)), "turned the wrong way"


def test_a_file_and_its_bytes_decode_alike(tmp_path):
    file = save(tmp_path / "a.png", noise())
    assert torch.equal(data.decode(file), data.decode(file.read_bytes()))
    assert torch.equal(data.decode(file).permute(1, 2, 0), torch.from_numpy(np.array(noise())))


def broken_files(folder):
    whole = save(folder / "whole.jpg", noise(size=(64, 64))).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text name.jpg").write_text("no image")
    return ["cut.jpg", "empty.png", "text name.jpg"]


def test_a_loop_over_images_ends(tmp_path):
    images = data.Images(torch.zeros(3, 3, 5, 7, dtype=torch.uint8), [0, 1, 2])
    assert [label for _, label in images] == [0, 1, 2]


def test_a_broken_image_is_named(tmp_path):
    for name in broken_files(tmp_path):
        with pytest.raises(InputError, match=name):
            data.decode(tmp_path / name)


def test_broken_images_can_be_left_out_with_their_names(tmp_path):
    names = broken_files(tmp_path)
    good, messages = data.without_unreadable(data.open_folder(tmp_path))
    assert len(good) == 1 and good[0][0].shape == (3, 64, 64)
    assert (
        all(any(name in message for message in messages) for name in names) and len(messages) == 3
    )


def test_class_folders_are_labels_in_alphabetical_order(tmp_path):
    for i, name in enumerate(["dog/a.jpg", "cat/b.PNG", "cat/deep/c.webp", "bird/d.gif"]):
        save(tmp_path / name, noise(i))
    (tmp_path / "cat" / "notes.txt").write_text("not an image, and no reason to stop")
    train, val = data.open_images(str(tmp_path))
    assert (
        train.classes == ["bird", "cat", "dog"]
        and train.labels.tolist() == [0, 1, 1, 2]
        and val is None
    )
    assert train[3][1] == 2 and train[3][0].dtype == torch.uint8


def test_a_flat_folder_or_a_single_class_has_no_labels(tmp_path):
    save(tmp_path / "flat/a b\nc.png", noise())
    save(tmp_path / "one/all/a.png", noise())
    for name in ("flat", "one"):
        train, _ = data.open_images(str(tmp_path / name))
        assert train.labels is None and train[0][1] == -1
        assert data.knn_split(train, None, 100) is None


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_parent_of_train_and_val_is_both(tmp_path, part):
    for name in ("train/x/a.png", "train/y/b.png", f"{part}/y/c.png"):
        save(tmp_path / name, noise())
    train, val = data.open_images(str(tmp_path))
    assert len(train) == 2 and val.labels.tolist() == [1] and val.classes == ["x", "y"]


def test_an_unknown_class_in_val_is_an_error(tmp_path):
    for name in ("train/x/a.png", "train/y/b.png", "val/z/c.png"):
        save(tmp_path / name, noise())
    with pytest.raises(InputError, match="'z'"):
        data.open_images(str(tmp_path))


@pytest.mark.parametrize("missing", ["nowhere", "empty", "file.png"])
def test_a_path_without_images_is_named(tmp_path, missing):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "file.png", noise())
    with pytest.raises(InputError, match=missing):
        data.open_images(str(tmp_path / missing))


def test_a_class_called_train_is_a_class(tmp_path):
    """Beside two others: beside one alone it may be a part, which is refused."""
    for name in ("train/a.png", "car/b.png", "bus/c.png"):
        save(tmp_path / name, noise())
    assert data.open_images(str(tmp_path))[0].classes == ["bus", "car", "train"]


def test_what_a_mac_leaves_behind_is_no_image(tmp_path):
    for name in ("a/1.png", "b/2.png"):
        save(tmp_path / name, noise())
    for name in ("a/._1.png", "__MACOSX/a/._1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"resource fork")
    assert len(data.open_images(str(tmp_path))[0]) == 2


def test_linked_folders_are_followed_once(tmp_path):
    save(tmp_path / "real/a.png", noise())
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "real")
    (tmp_path / "real/loop").symlink_to(tmp_path / "real")
    assert len(data.find_images(tmp_path / "data")) == 1


def test_a_dataset_of_torchvision_is_read_through_its_own_class(tmp_path):
    for i, name in enumerate(["Forest/1.jpg", "River/2.jpg", "River/3.jpg"]):
        save(tmp_path / "eurosat/2750" / name, noise(i))
    train, val = data.open_images(str(tmp_path), "eurosat")
    assert len(train) == 3 and train.labels.tolist() == [0, 1, 1] and val is None
    assert train[2][0].shape == (3, 7, 11) and train[2][1] == 1


def test_a_dataset_that_is_not_there_names_the_flag(tmp_path):
    with pytest.raises(InputError, match=r"cifar10 is not under.*--download"):
        data.open_images(str(tmp_path), "cifar10")


def test_an_unknown_dataset_is_an_error_that_lists_the_known():
    with pytest.raises(InputError, match="cifar10, cifar100"):
        data.open_images("", "imagenet21k")


def test_without_a_test_part_every_fifth_image_is_a_test_image_and_no_train_image():
    images = data.Images(
        torch.arange(23).view(23, 1, 1, 1).byte().expand(23, 3, 1, 1), torch.arange(23) % 3, "abc"
    )
    train, test = data.knn_split(images, None, 100)
    assert test.source[:, 0, 0, 0].tolist() == [4, 9, 14, 19] and len(train) == 19
    fewer, test = data.knn_split(images, None, 10)
    assert len(fewer) == 10 and len(test) == 4


def test_images_without_a_label_among_labelled_ones_are_left_out():
    images = data.Images(
        torch.zeros(10, 3, 1, 1).byte(), torch.tensor([-1, 0, 1, -1, 0, 1, 0, 1, 0, 1]), "ab"
    )
    train, test = data.knn_split(images, None, 100)
    assert len(train) + len(test) == 8 and train.labels.min() == 0


def test_a_part_of_the_images_to_measure_with_has_all_classes_alike_and_is_the_same_each_time():
    """Also where classes take turns, as the creatures' do: every second one is of an even class."""
    numbers = torch.arange(4000).view(-1, 1, 1, 1)
    images = data.Images(numbers, torch.arange(4000) % 10)
    part = data.at_most(images, 1000)
    counts = part.labels.bincount()
    assert len(part) == 1000 and counts.min() > 80 and counts.max() < 120, counts
    assert torch.equal(part.source, data.at_most(images, 1000).source)
    assert torch.equal(part.source.flatten() % 10, part.labels), "images keep their labels"
    assert data.at_most(images, 4000) is images
