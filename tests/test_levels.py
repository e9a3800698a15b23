"""Images of more than 8 bits: one black and one white for a data set, and no levels lost."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_bad_input import TINY, error_of
from test_data import save

import data
import eval_knn
import train
import visualize_attention
from evals import attention_film, copy_detection, image_retrieval, linear, transfer
from runtime.commandline import InputError
from training.checkpoint import load_backbone, read_checkpoint
from training.levels import find_levels


def ramp(lowest: float, highest: float, dtype, size: int = 64) -> Image.Image:
    """An image of size levels, evenly spaced, each in a column of 2 pixels."""
    values = np.linspace(lowest, highest, size).astype(dtype)
    return Image.fromarray(np.stack([values, values]))


def levels_of(image: torch.Tensor) -> int:
    return len(image.unique())


@pytest.mark.parametrize("bits", [9, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["png", "tiff", "pgm"])
def test_integers_of_any_bits_reach_from_black_to_white(bits, kind, tmp_path):
    """value / (2^bits - 1) * 255, within a rounding."""
    highest = 2**bits - 1
    file = save(tmp_path / f"xray.{kind}", ramp(0, highest, np.uint16, 256))
    expected = np.linspace(0, highest, 256).astype(np.uint16) / highest * 255
    seen = data.decode(file).numpy()
    np.testing.assert_allclose(seen, np.broadcast_to(expected, seen.shape), atol=0.51)
    assert levels_of(data.decode(file)) == 256


@pytest.mark.parametrize(
    ("lowest", "highest"), [(0, 1), (0, 1.0001), (-1000, 3000), (1e-6, 2e-6), (0, 255), (-1, 1)]
)
def test_floats_of_any_range_keep_their_levels(lowest, highest, tmp_path):
    file = save(tmp_path / "a.tiff", ramp(lowest, highest, np.float32))
    assert levels_of(data.decode(file)) == 64


@pytest.mark.parametrize(("lowest", "highest"), [(7000, 9000), (30000, 34000), (-1024, 3071)])
def test_integers_far_from_zero_keep_their_levels(lowest, highest, tmp_path):
    """Heat cameras and signed computed tomography."""
    file = save(tmp_path / "a.tiff", ramp(lowest, highest, np.int32))
    assert levels_of(data.decode(file)) == 64


def test_a_file_of_8_bits_in_16_keeps_its_values(tmp_path):
    file = save(tmp_path / "a.png", ramp(0, 200, np.uint16))
    assert data.decode(file).max() == 200


def test_one_rule_holds_for_a_data_set_so_that_dark_images_stay_dark(tmp_path):
    save(tmp_path / "train/cat/dark.png", ramp(0, 300, np.uint16))
    save(tmp_path / "train/dog/bright.tif", ramp(0, 900, np.uint16))
    save(tmp_path / "val/dog/brightest.png", ramp(0, 4095, np.uint16))
    images, val = data.open_images(str(tmp_path))
    assert images.levels == val.levels == (0, 4095)
    found = [images[0][0].max(), images[1][0].max(), val[0][0].max()]
    assert found == [round(300 / 4095 * 255), round(900 / 4095 * 255), 255]
    note = images.notes[-1]
    assert "3 of 3 files" in note and "values 0 to 4095" in note and "--levels 0 4095" in note


def test_levels_go_where_the_images_go(tmp_path):
    for number in range(7):
        save(tmp_path / f"{'ab'[number % 2]}/{number}.png", ramp(0, 100 * 2**number, np.uint16))
    images, _ = data.open_images(str(tmp_path))
    for part in (*data.knn_split(images, None), data.without_unreadable(images)[0]):
        assert part.levels == (0, 8191)


def test_given_levels_are_taken(tmp_path):
    save(tmp_path / "a.tif", ramp(-9999, 1, np.float32))
    images, _ = data.open_images(str(tmp_path), levels=(0, 1))
    assert images[0][0].max() == 255 and levels_of(images[0][0]) == 2
    assert "--levels 0 1" in images.notes[0]
    inverted, _ = data.open_images(str(tmp_path), levels=(1, 0))
    assert inverted[0][0].min() == 0 and inverted[0][0][0, 0, 0] == 255


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_black_or_white_and_spoils_no_level(value, tmp_path):
    values = np.linspace(0, 3, 64, dtype=np.float32).reshape(2, 32).copy()
    values[0, 0] = value
    save(tmp_path / "a.tiff", Image.fromarray(values))
    image = data.open_images(str(tmp_path))[0][0][0]
    assert levels_of(image) >= 63 and image[0, 0, 0] in (0, 255)


@pytest.mark.parametrize("value", [0, 0.25, 1, 1000, -3])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_an_image_of_one_value_is_read(value, dtype, tmp_path):
    file = save(tmp_path / "a.tiff", Image.fromarray(np.full((3, 5), value, dtype)))
    assert levels_of(data.decode(file)) == 1


def test_ordinary_images_need_no_word_and_no_levels(tmp_path):
    for name in ("a.png", "b.tif", "c.jpg", "d.gif"):
        save(tmp_path / name, Image.new("RGB", (5, 3), (250, 120, 3)))
    images, _ = data.open_images(str(tmp_path))
    assert images.levels is None and images.notes == []


def test_jpegs_are_not_opened_to_find_levels(tmp_path, monkeypatch):
    save(tmp_path / "a.jpg", Image.new("RGB", (5, 3)))
    monkeypatch.setattr(Image, "open", lambda file: pytest.fail("a JPEG was opened"))
    data.open_images(str(tmp_path))


def test_integers_beside_floats_are_refused_and_both_are_named(tmp_path, capsys):
    save(tmp_path / "float.tif", ramp(0, 1, np.float32))
    save(tmp_path / "integer.png", ramp(0, 4095, np.uint16))
    flags = [*TINY, "--data_path", tmp_path, "--output_dir", tmp_path / "run"]
    said = error_of(train.main, capsys, *flags)
    assert "float.tif" in said and "integer.png" in said and "--levels BLACK WHITE" in said


def test_levels_that_are_one_value_are_refused(tmp_path, capsys):
    save(tmp_path / "integer.png", ramp(0, 4095, np.uint16))
    flags = [*TINY, "--data_path", tmp_path, "--output_dir", tmp_path / "run"]
    said = error_of(train.main, capsys, *flags, "--levels", "7", "7")
    assert "--levels 7 7 must be two values" in said


@pytest.mark.usefixtures("no_report")
def test_a_continued_run_keeps_its_levels_whatever_was_added(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        save(tmp_path / f"xrays/{number}.png", ramp(0, 1000, np.uint16))
    flags = [*TINY, "--data_path", "xrays", "--output_dir", "run", "--num_workers", "0"]
    train.main(flags)
    assert "--levels 0 1023 are black and white" in capsys.readouterr().out
    assert read_checkpoint("run/checkpoint.pth")["args"]["levels"] == (0, 1023)

    save(tmp_path / "xrays/5.png", ramp(0, 60000, np.uint16))
    train.main([*flags, "--epochs", "2"])
    said = capsys.readouterr().out
    assert "--levels 0 1023 are black and white" in said
    assert "changed since: epochs 2" in said and "levels 0" not in said.split("changed since")[1]

    train.main([*flags, "--epochs", "3", "--levels", "0", "65535"])
    assert "levels 0.0 65535.0" in capsys.readouterr().out.split("changed since")[1]


def png_of_16_bits(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write: (H, W, 2 to 4) uint16."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        size = len(body).to_bytes(4, "big")
        return size + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    colour = {2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff_of_16_bits(values: np.ndarray, order: str) -> bytes:
    """An uncompressed TIFF of 16 bits a channel in one strip: (H, W, 3) uint16; order: < or >."""
    height, width, _ = values.shape
    body = values.astype(order + "u2").tobytes()
    start = 8 + 2 + 12 * 9 + 4
    tags = [(256, width), (257, height), (259, 1), (262, 2), (277, 3), (278, height)]
    entries = [(tag, struct.pack(order + "HIHH", 3, 1, value, 0)) for tag, value in tags]
    entries += [
        (258, struct.pack(order + "HII", 3, 3, start)),
        (273, struct.pack(order + "HII", 4, 1, start + 6)),
        (279, struct.pack(order + "HII", 4, 1, len(body))),
    ]
    said = b"".join(struct.pack(order + "H", tag) + entry for tag, entry in sorted(entries))
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HIH", 42, 8, 9)
    return head + said + bytes(4) + struct.pack(order + "HHH", 16, 16, 16) + body


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["png", "little.tif", "big.tif"])
def test_colours_of_any_bits_reach_from_black_to_white(bits, kind, tmp_path):
    """Pillow alone keeps the upper 8 of 16 bits: 12 bits would have 16 levels."""
    highest = 2**bits - 1
    values = np.random.default_rng(bits).integers(0, highest + 1, (7, 11, 3)).astype(np.uint16)
    values[0, 0] = highest
    whole = png_of_16_bits(values)
    if "tif" in kind:
        whole = tiff_of_16_bits(values, "<" if kind == "little.tif" else ">")
    (tmp_path / f"a.{kind}").write_bytes(whole)
    images, _ = data.open_images(str(tmp_path))
    seen = images[0][0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(seen, values / highest * 255, atol=0.51)
    assert images.levels == (0, highest) and len(images.notes) == 1
    assert torch.equal(data.decode(whole), images[0][0]), "its bytes are read alike"


def test_deep_colours_lie_on_white_where_they_are_transparent(tmp_path):
    values = np.full((2, 3, 4), 4095, np.uint16)
    values[0] = 0  # transparent black
    values[1, :, :3] = [0, 2048, 4095]
    values[1, :, 3] = 65535
    seen = data.decode(png_of_16_bits(values))
    assert seen[:, 0].eq(255).all() and seen[:, 1, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_grey_of_any_bits_beside_alpha_reaches_from_black_to_white(bits, tmp_path):
    """Pillow alone keeps the upper 8 of 16 bits."""
    highest = 2**bits - 1
    values = np.random.default_rng(bits).integers(0, highest + 1, (7, 11, 2)).astype(np.uint16)
    values[0, 0, 0] = highest
    values[..., 1] = 65535
    values[3, 5] = [0, 255]  # nearly transparent black
    (tmp_path / "a.png").write_bytes(png_of_16_bits(values))
    images, _ = data.open_images(str(tmp_path))
    seen = images[0][0]
    assert seen[:, 3, 5].tolist() == [255, 255, 255]
    expected = values[..., 0] / highest * 255
    expected[3, 5] = 255
    for channel in seen:
        np.testing.assert_allclose(channel.numpy(), expected, atol=0.51)
    assert images.levels == (0, highest) and len(images.notes) == 1


@pytest.mark.parametrize("kind", ["tiff", "png"])
def test_deep_images_are_turned_upright_too(kind, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    file = save(tmp_path / f"a.{kind}", ramp(0, 4095, np.uint16), exif=exif)
    seen = data.decode(file)
    assert seen.shape == (3, 64, 2) and seen[0, 0, 0] == 0 and seen[0, -1, 0] == 255


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_what_is_transparent_lies_on_white(mode, tmp_path):
    """Black where it is opaque, black too under what is transparent: the release's RGB is black."""
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (2, 0, 4, 2))
    if mode == "P":
        palette = Image.new("P", (4, 2), 0)
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.paste(1, (2, 0, 4, 2))
        palette.info["transparency"] = 0
        file = save(tmp_path / "a.gif", palette, transparency=0)
        seen = data.decode(file)
    elif mode == "PA":
        seen = torch.from_numpy(np.array(data.to_rgb(image.convert("PA")))).permute(2, 0, 1)
    else:
        seen = data.decode(save(tmp_path / "a.png", image.convert(mode)))
    assert seen[:, :, :2].eq(255).all() and seen[:, :, 2:].eq(0).all()


def test_a_transparent_colour_of_an_rgb_png_is_white(tmp_path):
    image = Image.new("RGB", (3, 2), (9, 9, 9))
    image.putpixel((0, 0), (1, 2, 3))
    file = save(tmp_path / "a.png", image, transparency=(9, 9, 9))
    seen = data.decode(file)
    assert seen[:, 0, 0].tolist() == [1, 2, 3] and seen[:, 1].eq(255).all()


@pytest.fixture(scope="module")
def xray_network(tmp_path_factory):
    """The checkpoint of a training on images of 10 bits."""
    folder = tmp_path_factory.mktemp("xrays")
    for number in range(4):
        save(folder / f"xrays/{number}.png", ramp(0, 1000, np.uint16))
    places = ["--data_path", str(folder / "xrays"), "--output_dir", str(folder)]
    train.main([*TINY, *places, "--num_workers", "0"])
    return folder / "checkpoint.pth"


def write_brighter(folder: Path) -> Path:
    """Two classes of five 16-bit images, which the network was not trained on."""
    for number in range(10):
        name = f"{'ab'[number % 2]}/{number}.png"
        save(folder / name, ramp(0, 500 * number + 3000, np.uint16))
    return folder


AS_TRAINED = "these levels are those of the checkpoint's training"
EVALUATIONS = {
    "k-NN": (eval_knn.main, "--data_path {0} --nb_knn 3"),
    "linear": (linear.main, "--data_path {0} --cached --epochs 1 --lr 0.1"),
    "retrieval": (image_retrieval.main, "--data_path {0}"),
    "copies": (copy_detection.main, "--data_path {1}"),
    "transfer": (transfer.main, "--data_path {0} --epochs 1 --warmup_epochs 0 --output_dir {2}"),
    "attention": (visualize_attention.main, "--image_path {1}/original --output_dir {2}"),
    "film": (attention_film.main, "--video {1}/original --output_dir {2}"),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_takes_the_black_and_white_of_the_training(
    name, xray_network, tmp_path, capsys
):
    main, flags = EVALUATIONS[name]
    bright = write_brighter(tmp_path / "bright")
    copies = tmp_path / "copydays"
    for file, number in (("original/000100.png", 3000), ("strong/000101.png", 4000)):
        save(copies / file, ramp(0, number, np.uint16))
    command = ["--pretrained_weights", str(xray_network), "--device", "cpu"]
    if name not in ("attention", "film"):
        command += ["--num_workers", "0", "--results", str(tmp_path / "results.jsonl")]
    command += flags.format(bright, copies, tmp_path / "out").split()
    main(command)
    said = capsys.readouterr().out
    assert "--levels 0 1023 are black and white" in said and AS_TRAINED in said

    if name == "transfer":
        command[-1] += "2"  # else it continues
    main([*command, "--levels", "0", "9000"])
    said = capsys.readouterr().out
    assert "--levels 0 9000 are black and white" in said and AS_TRAINED not in said


@pytest.mark.parametrize("name", ["k-NN", "attention"])
def test_images_of_8_bits_are_evaluated_without_a_word_about_levels(
    name, xray_network, tmp_path, capsys
):
    main, flags = EVALUATIONS[name]
    for number in range(10):
        image = Image.new("RGB", (23, 29), (20 * number, 100, 3))
        save(tmp_path / f"photos/{'ab'[number % 2]}/{number}.png", image)
    save(tmp_path / "one/original/0.png", image)
    command = ["--pretrained_weights", str(xray_network), "--device", "cpu"]
    if name == "k-NN":
        command += ["--num_workers", "0", "--results", str(tmp_path / "results.jsonl")]
    main([*command, *flags.format(tmp_path / "photos", tmp_path / "one", tmp_path / "out").split()])
    assert "levels" not in capsys.readouterr().out


def test_the_attention_of_a_deep_image_is_drawn_in_the_trainings_levels(xray_network, tmp_path):
    file = save(tmp_path / "a.png", ramp(0, 60000, np.uint16))
    command = ["--pretrained_weights", str(xray_network), "--image_path", str(file)]
    visualize_attention.main([*command, "--device", "cpu", "--output_dir", str(tmp_path)])
    drawn = np.array(Image.open(tmp_path / "img.png"))[..., 0]
    assert (drawn == 255).mean() > 0.9, "all above 1023 is white"


def test_transfer_keeps_its_levels_for_those_who_evaluate_it(xray_network, tmp_path):
    main, flags = EVALUATIONS["transfer"]
    bright = write_brighter(tmp_path / "bright")
    command = ["--from_scratch", "--device", "cpu", "--num_workers", "0"]
    command += "--arch vit_nano --eval_size 32 --batch_size 4".split()
    command += ["--results", str(tmp_path / "results.jsonl")]
    main([*command, *flags.format(bright, "", tmp_path / "out").split()])
    assert read_checkpoint(tmp_path / "out/checkpoint.pth")["args"]["levels"] == (0, 8191)


@pytest.mark.parametrize("levels", [7, (1.0,), ("a", "b")])
def test_a_checkpoint_whose_levels_are_none_is_refused(levels, xray_network, tmp_path):
    stored = read_checkpoint(xray_network)
    stored["args"]["levels"] = levels
    torch.save(stored, tmp_path / "other.pth")
    with pytest.raises(InputError, match="as its --levels"):
        load_backbone(tmp_path / "other.pth")


def test_levels_that_leave_an_image_black_are_refused(tmp_path):
    """Floats from 0 to 1 by the levels of a training on 12 bits."""
    values = np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7)
    Image.fromarray(values).save(tmp_path / "one.tif")
    with pytest.raises(InputError, match=r"fill 0\.062 of 255 levels between --levels 0 4095"):
        find_levels([tmp_path / "one.tif"], (0.0, 4095.0))
