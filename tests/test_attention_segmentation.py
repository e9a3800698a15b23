"""Fig. 4's protocol: best head for each object, mean over objects, then over images; void counts
nowhere.
"""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attention import cls_attention, keep_mass, object_scores
from data import Images, decode
from evals import attention_segmentation, masked_images
from evals.masked_images import (
    MaskedImages,
    Meaning,
    open_pairs,
    open_voc,
    read_numbers,
    read_pair,
    read_pet,
    read_voc,
)
from runtime.commandline import InputError
from runtime.creatures import CLASSES, make_creatures
from training.backbone import build_backbone
from training.checkpoint import load_backbone
from training.evaluation import fit_to_patches


def test_jaccards_are_those_of_a_loop_over_objects_heads_and_pixels():
    """max_h |M_h and G_o| / |M_h or G_o|, averaged over o, without void pixels, at the mask's own
    resolution.
    """
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(3, 2, 5, generator=generator) ** 3
    numbers = torch.randint(0, 4, (11, 17), generator=generator)  # 0 the ground, 3 void
    objects, void = torch.stack([numbers == 1, numbers == 2]), numbers == 3
    kept, total = keep_mass(attention, 0.6), 0.0
    for one in objects:
        jaccards = []
        for head in range(3):
            both = either = 0
            for y in range(11):
                for x in range(17):
                    if not void[y, x]:
                        mask = bool(kept[head, y * 2 // 11, x * 5 // 17])
                        both, either = (
                            both + (mask and bool(one[y, x])),
                            either + (mask or bool(one[y, x])),
                        )
            jaccards.append(both / either)
        total += max(jaccards)
    assert object_scores(attention, objects, void)["jaccard_best_head_60"] == pytest.approx(
        50 * total, rel=1e-5
    )


def test_each_object_takes_its_own_best_head():
    attention = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])
    objects = torch.zeros(2, 4, 4, dtype=torch.bool)
    objects[0, :2, :2], objects[1, 2:, 2:] = True, True
    scores = object_scores(attention, objects, torch.zeros(4, 4, dtype=torch.bool), (60, 75))
    assert scores["jaccard_best_head_60"] == scores["jaccard_best_head_75"] == 100
    assert scores["jaccard_head_mean_75"] == pytest.approx(50), (
        "one mask of both patches is half right for each"
    )
    assert scores["mass_on_object"] == pytest.approx(1)


def test_void_pixels_neither_hurt_nor_help():
    """Whatever lies under void, on the mask or off it, the Jaccard is that of the other pixels."""
    attention = torch.tensor([[[0.7, 0.3], [0.0, 0.0]]])  # keeps the left upper quarter at 60 %
    objects = torch.zeros(1, 4, 4, dtype=torch.bool)
    objects[0, :2, 0] = True
    void = torch.zeros(4, 4, dtype=torch.bool)
    assert object_scores(attention, objects, void)["jaccard_best_head_60"] == 50
    void[:2, 1] = True
    assert object_scores(attention, objects, void)["jaccard_best_head_60"] == 100


def write_voc(folder: Path) -> Path:
    """Two images: one with one object, one with three, and a third without any; void in all."""
    for part in ("JPEGImages", "SegmentationObject", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, (height, width), objects in (
        ("one", (31, 53), 1),
        ("three", (47, 29), 3),
        ("none", (31, 31), 0),
    ):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
            folder / "JPEGImages" / f"{name}.jpg"
        )
        mask = np.zeros((height, width), dtype=np.uint8)
        for i in range(objects):
            mask[7 * i : 7 * i + 11, 5 * i : 19] = i + 1
        mask[20:23] = 255
        image = Image.fromarray(mask)
        image.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
        image.save(folder / "SegmentationObject" / f"{name}.png")
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("one\nthree\nnone\n")
    return folder


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save(build_backbone("vit_nano", 8, 48, init_std=0.2).state_dict(), path)
    return path


def run(tmp_path: Path, *flags) -> dict:
    attention_segmentation.main(
        [
            *map(str, flags),
            "--device",
            "cpu",
            "--num_workers",
            "0",
            "--results",
            str(tmp_path / "results.jsonl"),
        ]
    )
    return json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])


def test_vocs_masks_are_read_by_their_numbers(tmp_path):
    items = open_voc(write_voc(tmp_path / "voc"))
    image, objects, void = read_voc(items[1])
    assert image.shape == (3, 47, 29) and objects.shape == (3, 47, 29)
    assert objects[2, 20 - 1, 12] and not objects[0, 20 - 1, 12] and void.sum() == 3 * 29
    assert read_voc(items[2])[1].shape == (0, 31, 31)
    assert len(MaskedImages(items, read_voc)) == 3


def test_a_trimaps_border_is_void():
    trimap = Image.fromarray(np.array([[1, 3, 2], [1, 1, 3]], dtype=np.uint8))
    image, objects, void = read_pet((Image.new("RGB", (3, 2)), trimap))
    assert image.shape == (3, 2, 3) and objects.tolist() == [
        [[True, False, False], [True, True, False]]
    ]
    assert void.tolist() == [[False, True, False], [False, False, True]]


def test_images_count_alike_however_many_objects_they_hold(weights, tmp_path, capsys):
    """Mean over objects, then over images: by hand on two; an image without objects is left out."""
    voc = write_voc(tmp_path / "voc")
    line = run(tmp_path, "--pretrained_weights", weights, "--data_path", voc, "--eval_size", 24)
    backbone, by_hand = load_backbone(weights)[0], []
    for name, size in (("one", (24, 40)), ("three", (40, 24))):
        image = decode(voc / "JPEGImages" / f"{name}.jpg")
        pixels = fit_to_patches(image, 24, 8).float() / 255
        assert pixels.shape[-2:] == size, (
            "the image's shape must be kept, in multiples of the patch"
        )
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        maps = cls_attention(
            backbone, ((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)).unsqueeze(0)
        )[0]
        _, objects, void = read_voc(
            (voc / "JPEGImages" / f"{name}.jpg", voc / "SegmentationObject" / f"{name}.png")
        )
        single = [
            object_scores(maps, one.unsqueeze(0), void)["jaccard_best_head_80"] for one in objects
        ]
        by_hand.append(sum(single) / len(single))
    assert line["measured"]["best head, 80 % of the mass: DINO"] == pytest.approx(
        sum(by_hand) / 2, abs=1e-3
    )
    assert "2 images, 4 objects" in line["data"]


def test_the_three_columns_of_the_embedded_images(weights, tmp_path, capsys, monkeypatch):
    """Random weights follow the seed, the supervised column stands where its file is given, and
    paper's beside ours.
    """
    drawn = make_creatures(13)
    few = Images(drawn.images, drawn.labels, CLASSES, drawn.masks)
    monkeypatch.setattr(masked_images, "open_images", lambda: (None, few))
    flags = ["--pretrained_weights", weights, "--eval_size", 64]
    two, three = run(tmp_path, *flags), run(tmp_path, *flags, "--supervised_weights", weights)
    other = run(tmp_path, *flags, "--seed", 1, "--threshold", 0.6)
    row = "best head, 60 % of the mass"
    assert f"{row}: supervised" not in two["measured"]
    columns = [three["measured"][f"{row}: {name}"] for name in ("supervised", "DINO")]
    assert columns == [two["measured"][f"{row}: DINO"]] * 2, "the same weights in both columns"
    assert two["measured"][f"{row}: random"] == three["measured"][f"{row}: random"]
    assert other["measured"][f"{row}: random"] != two["measured"][f"{row}: random"]
    assert not any("80 %" in name for name in other["measured"])
    assert (
        "the embedded creatures: 13 images, 13 objects, short side 64 pixels"
        in capsys.readouterr().out
    )


def test_the_papers_numbers_stand_beside_those_of_its_networks(tmp_path, capsys):
    torch.save(build_backbone("vit_small", 16, 32).state_dict(), tmp_path / "small.pth")
    line = run(
        tmp_path,
        "--pretrained_weights",
        tmp_path / "small.pth",
        "--data_path",
        write_voc(tmp_path / "voc"),
        "--eval_size",
        32,
    )
    assert line["paper"]["best head, 60 % of the mass: DINO"] == 45.9
    assert line["paper"]["best head, 80 % of the mass: random"] == 22.0


def test_other_images_than_voc12_s_have_no_number_of_the_paper(tmp_path, monkeypatch):
    torch.save(build_backbone("vit_small", 16, 32).state_dict(), tmp_path / "small.pth")
    drawn = make_creatures(3)
    few = Images(drawn.images, drawn.labels, CLASSES, drawn.masks)
    monkeypatch.setattr(masked_images, "open_images", lambda: (None, few))
    line = run(tmp_path, "--pretrained_weights", tmp_path / "small.pth", "--eval_size", 32)
    assert line["paper"] == {}


def test_bad_input_is_one_line(weights, tmp_path, capsys):
    voc = write_voc(tmp_path / "voc")

    def said(*flags) -> str:
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path, "--pretrained_weights", *flags)
        assert stopped.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]  # below the progress bar

    assert "--threshold [0.6, 1.2]" in said(weights, "--threshold", 0.6, 1.2)
    assert "--dataset cifar10 has no masks" in said(weights, "--dataset", "cifar10")
    assert "oxford_pets is not under" in said(
        weights, "--dataset", "oxford_pets", "--data_path", tmp_path / "pets"
    )
    assert "must be laid out as" in said(weights, "--data_path", tmp_path)
    Image.new("L", (53, 30)).save(voc / "SegmentationObject" / "one.png")
    assert "as large as their images" in said(weights, "--data_path", voc)
    Image.new("RGB", (53, 31), "red").save(voc / "SegmentationObject" / "one.png")
    assert "one number a pixel" in said(weights, "--data_path", voc)
    (voc / "SegmentationObject" / "one.png").write_bytes(b"torn")
    assert "one.png" in said(weights, "--data_path", voc)
    (voc / "SegmentationObject" / "three.png").unlink()
    assert "names 'three', but there is no" in said(weights, "--data_path", voc)
    torch.save(build_backbone("resnet18").state_dict(), tmp_path / "convnet.pth")
    assert "resnet18 has no attention" in said(tmp_path / "convnet.pth", "--arch", "resnet18")
    torch.save(build_backbone("vit_nano", 16, 48).state_dict(), tmp_path / "other.pth")
    assert "other.pth" in said(weights, "--supervised_weights", tmp_path / "other.pth")


def write_pair(folder: Path, name: str, numbers: np.ndarray, ending: str = "png") -> None:
    """Write an image of 31 x 47 pixels, and these numbers as its mask."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (31, 47, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / f"{name}.jpg")
    Image.fromarray(numbers).save(folder / "masks" / f"{name}.{ending}", quality=70)


def numbers_with(*values: int) -> np.ndarray:
    """Return a mask (31, 47) of the first value, with a square of each of the others."""
    numbers = np.full((31, 47), values[0], dtype=np.uint8)
    for i, value in enumerate(values[1:]):
        numbers[7:20, 12 * i + 2 : 12 * i + 11] = value
    return numbers


def pair_flags(folder: Path) -> Namespace:
    """Return the flags of a folder that write_pair wrote."""
    folders = {part: str(folder / part) for part in ("images", "masks")}
    return Namespace(**folders, levels=(0, 0))


def read_mask(folder: Path, numbers: np.ndarray, ending: str = "png"):
    """Return the objects and the void of a plain folder's only mask."""
    write_pair(folder, "one", numbers, ending)
    pairs = open_pairs(pair_flags(folder), {})
    assert len(pairs) == 1
    _, objects, void = pairs[0]
    return objects, void


@pytest.mark.parametrize("values", [(0, 255), (0, 1), (3, 200), (0, 128)])
def test_a_mask_of_two_values_is_one_object_whatever_they_are(tmp_path, values):
    numbers = numbers_with(*values)
    objects, void = read_mask(tmp_path, numbers)
    assert torch.equal(objects, torch.from_numpy(numbers == values[1]).unsqueeze(0))
    assert not void.any()


def test_more_values_are_objects_and_255_beside_them_is_void(tmp_path):
    numbers = numbers_with(0, 7, 9, 255)
    objects, void = read_mask(tmp_path, numbers)
    assert torch.equal(objects, torch.from_numpy(np.stack([numbers == 7, numbers == 9])))
    assert torch.equal(void, torch.from_numpy(numbers == 255))


def test_a_mask_of_one_value_is_all_ground_or_all_object(tmp_path):
    assert not read_mask(tmp_path / "ground", numbers_with(0))[0].any()
    assert read_mask(tmp_path / "object", numbers_with(255))[0].all()


def read_folder(folder: Path, *masks: tuple[int, ...]) -> tuple[list[torch.Tensor], str]:
    """Write masks of these values; return what each holds as numbers, and the notes.

    1, 2 ...: the objects; 0: the ground; -1: void.
    """
    for i, values in enumerate(masks):
        write_pair(folder, f"{i}", numbers_with(*values))
    pairs = open_pairs(pair_flags(folder), {})
    found = []
    for _, objects, void in pairs:
        numbers = torch.zeros(31, 47)
        for i, one in enumerate(objects):
            numbers[one] = i + 1
        numbers[void] = -1
        found.append([numbers[0, 0].item(), *numbers[8, [3, 15, 27]].tolist()])
    return found, "\n".join(pairs.notes)


def test_what_255_means_is_decided_once_for_all_masks_of_a_folder(tmp_path):
    """Three values with 255 in one mask: 255 is void in all of them."""
    found, notes = read_folder(
        tmp_path / "void", (0, 5, 255), (15, 255), (0, 255), (0, 255, 7), (0, 1)
    )
    assert found == [
        [0, 1, -1, 0], [1, -1, 1, 1], [0, -1, 0, 0], [0, -1, 1, 0], [0, 1, 0, 0]
    ]
    assert "'0.png'" in notes and "255 is void" in notes and len(notes.splitlines()) == 1

    found, notes = read_folder(tmp_path / "two", (0, 255), (15, 255), (0, 1))
    assert found == [[0, 1, 0, 0]] * 3
    assert "the larger value is the object" in notes and len(notes.splitlines()) == 1

    found, notes = read_folder(tmp_path / "numbers", (0, 1, 2), (0, 255), (2, 1), (3,))
    assert found == [[0, 1, 2, 0], [0, 1, 0, 0], [2, 1, 2, 2], [1, 1, 1, 1]]
    assert "every number but 0 is an object" in notes and "void" not in notes


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_a_mask_is_turned_as_its_image_is(tmp_path, ending):
    """Orientation 6: a camera that was held upright."""
    numbers = numbers_with(0, 255)
    write_pair(tmp_path, "one", numbers)
    (tmp_path / "masks/one.png").unlink()
    file = tmp_path / "masks" / f"one.{ending}"
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.stack(3 * [numbers], axis=-1))
    image.save(tmp_path / "images/one.jpg", exif=exif, quality=95)
    Image.fromarray(numbers).save(file, exif=exif)
    image, objects, _ = open_pairs(pair_flags(tmp_path), {})[0]
    assert image.shape == (3, 47, 31)
    assert torch.equal(objects[0], torch.from_numpy(np.rot90(numbers == 255, -1).copy()))
    assert ((image[0] > 127) == objects[0]).float().mean() > 0.99


@pytest.mark.parametrize("size", [(94, 62), (24, 16), (23, 15), (9, 6)])
def test_a_mask_may_be_of_another_size(tmp_path, size):
    write_pair(tmp_path, "one", numbers_with(0, 255))
    Image.new("L", size, 1).save(tmp_path / "masks/one.png")
    assert open_pairs(pair_flags(tmp_path), {})[0][1].shape == (1, *size[::-1])


@pytest.mark.parametrize("size", [(31, 47), (47, 47), (47, 28), (60, 31), (400, 200)])
def test_a_mask_of_another_shape_is_refused(tmp_path, size):
    write_pair(tmp_path, "one", numbers_with(0, 255))
    Image.new("L", size, 1).save(tmp_path / "masks/one.png")
    with pytest.raises(InputError) as refused:
        open_pairs(pair_flags(tmp_path), {})[0]
    assert f"one.png' is {size[0]} x {size[1]} pixels" in str(refused.value)
    assert "47 x 31" in str(refused.value)


def test_a_mask_of_fractions_or_in_the_transparency_is_refused(tmp_path):
    numbers = numbers_with(0, 255)
    write_pair(tmp_path, "one", numbers)
    (tmp_path / "masks/one.png").unlink()
    file = tmp_path / "masks/one.tif"
    Image.fromarray(numbers.astype(np.float32) / 255).save(file)
    assert torch.equal(read_numbers(file), torch.from_numpy(numbers // 255).int())
    for fraction in (0.9, np.nan, np.inf, 1e30):
        Image.fromarray(np.where(numbers == 255, fraction, 0).astype(np.float32)).save(file)
        with pytest.raises(InputError, match=r"one\.tif.*no whole number.*0 and 255"):
            read_numbers(file)

    for mode in ("RGBA", "LA"):
        image = Image.new(mode, (47, 31))
        image.putalpha(Image.fromarray(numbers))
        image.save(tmp_path / "masks/one.png")
        with pytest.raises(InputError, match=r"one\.png.*transparency"):
            read_numbers(tmp_path / "masks/one.png")


def test_images_without_ground_have_no_auc_and_are_counted(weights, tmp_path, capsys):
    write_pair(tmp_path, "first", numbers_with(0, 255))
    write_pair(tmp_path, "second", numbers_with(0, 255))
    flags = ("--images", tmp_path / "images", "--masks", tmp_path / "masks", "--eval_size", 24)
    line = run(tmp_path, "--pretrained_weights", weights, *flags)
    assert "no ground" not in line["data"]
    Image.new("L", (47, 31), 255).save(tmp_path / "masks/second.png")
    line = run(tmp_path, "--pretrained_weights", weights, *flags)
    assert "2 images, 2 objects" in line["data"]
    assert "AUC of 1 images, since 1 have no ground" in line["data"]


def test_a_jpegs_blurred_borders_are_cut_half_way(tmp_path):
    numbers = numbers_with(0, 255)
    objects, _ = read_mask(tmp_path, numbers, ending="jpg")
    assert len(objects) == 1
    assert torch.equal(objects[0], torch.from_numpy(numbers == 255))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1", "I;16"])
def test_a_mask_of_any_mode_is_read_by_its_one_number(tmp_path, mode):
    numbers = numbers_with(0, 255)
    write_pair(tmp_path, "one", numbers)
    file = tmp_path / "masks" / "one.png"
    Image.fromarray(numbers).convert(mode).save(file)
    meaning = Meaning(numbered=False, has_void=False)
    _, objects, _ = read_pair((tmp_path / "images" / "one.jpg", file), meaning)
    assert torch.equal(objects, torch.from_numpy(numbers == 255).unsqueeze(0))


def test_plain_folders_are_measured_by_names_with_intervals(weights, tmp_path, capsys):
    """Two images with masks, one of another size; and what has no partner is counted."""
    write_pair(tmp_path, "first", numbers_with(0, 1))
    write_pair(tmp_path, "second", numbers_with(0, 1, 2, 255))
    write_pair(tmp_path, "lonely image", numbers_with(0, 1))
    (tmp_path / "masks/lonely image.png").unlink()
    Image.new("L", (47, 31)).save(tmp_path / "masks" / "lonely mask.png")
    first = tmp_path / "masks/first.png"
    flags = ("--images", tmp_path / "images", "--masks", tmp_path / "masks", "--eval_size", 24)

    line = run(tmp_path, "--pretrained_weights", weights, *flags)
    assert "2 images, 3 objects" in line["data"] and "resized" not in line["data"]
    said = capsys.readouterr().out
    assert "left out: 1 images without a mask, 1 masks without an image" in said
    assert "95 % interval" in said
    assert line["intervals"].keys() == line["measured"].keys()
    for row, (low, high) in line["intervals"].items():
        assert low - 1e-3 <= line["measured"][row] <= high + 1e-3, row
    assert "AUC, centre prior" in line["measured"] and line["paper"] == {}
    assert "AUC, prior and all heads: random" in line["measured"]

    with Image.open(first) as mask:
        larger = mask.resize((2 * 47, 2 * 31), Image.Resampling.NEAREST)
    larger.save(first)
    resized = run(tmp_path, "--pretrained_weights", weights, *flags)
    assert "1 masks resized to their image's size by nearest neighbour" in resized["data"]
    assert resized["measured"] == pytest.approx(line["measured"], abs=1e-3)


def test_bad_folders_are_one_line(weights, tmp_path, capsys):
    def said(images, masks, *more) -> str:
        folders = ["--images", images]
        if masks:
            folders += ["--masks", masks]
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path, "--pretrained_weights", weights, *folders, *more)
        assert stopped.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    write_pair(tmp_path, "one", numbers_with(0, 255))
    images, masks = tmp_path / "images", tmp_path / "masks"
    assert "--images and --masks go together" in said(images, "")
    assert "leave --data_path and --dataset out" in said(images, masks, "--data_path", tmp_path)
    assert "--masks" in said(images, tmp_path / "nowhere")
    Image.fromarray(np.arange(31 * 47).reshape(31, 47).astype(np.uint8)).save(masks / "one.png")
    assert "has 256 shades" in said(images, masks)
    Image.new("RGB", (47, 31), "red").save(masks / "one.png")
    assert "holds RGB colours" in said(images, masks)
    (masks / "one.png").write_bytes(b"torn")
    assert "one.png" in said(images, masks)
    (masks / "one.png").rename(masks / "another.png")
    assert "names must be the same" in said(images, masks)
    Image.new("L", (47, 31)).save(masks / "another.bmp")
    assert "has both" in said(images, masks)
