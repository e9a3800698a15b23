"""Copy detection: distortions made the same every time, Copydays' layout, descriptors, and copies
that are found.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_bad_input import error_of
from torchvision.transforms.functional import resize, to_pil_image

from data import Images
from evals import copy_detection
from evals.copy_detection import (
    DISTORTIONS,
    Copies,
    Descriptor,
    distorted,
    find_copies,
    made_copies,
    open_copydays,
)
from runtime.commandline import InputError
from runtime.creatures import make_creatures
from training import evaluation
from training.backbone import build_backbone


def write_copydays(folder: Path, n: int) -> Path:
    """n creatures and their strong copies, in Copydays' layout."""
    for part in ("original", "strong"):
        (folder / part).mkdir(parents=True)
    for number, image in enumerate(make_creatures(n, 64).images):
        to_pil_image(image).save(folder / "original" / f"{number:04}00.jpg", quality=95)
        for i, copy in enumerate(distorted(image, number), start=1):
            copy.save(folder / "strong" / f"{number:04}{i:02}.jpg", quality=95)
    return folder


def save_creatures(folder: Path, n: int, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(make_creatures(n, 64, seed).images):
        to_pil_image(image).resize((61, 47)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    torch.save(
        build_backbone("vit_nano", 16, 32, init_std=0.2).state_dict(), tmp_path / "weights.pth"
    )
    return tmp_path / "weights.pth"


def test_copies_depend_on_the_image_and_its_number_alone():
    """The same number gives the same copies, another others; each copy differs from the image."""
    image = make_creatures(1, 64).images[0][:, :47]
    first, again, other = distorted(image, 3), distorted(image, 3), distorted(image, 5)
    for name, one, same, another in zip(DISTORTIONS, first, again, other, strict=True):
        assert one.mode == "RGB" and one.tobytes() == same.tobytes(), (
            f"{name} is not the same a second time"
        )
        assert one.tobytes() not in (another.tobytes(), to_pil_image(image).tobytes()), (
            f"{name} changed nothing"
        )


def test_what_each_distortion_keeps_of_the_image():
    """Crops keep 20 to 50 % of the area and the shape, print and scan turns on larger paper, others
    keep the size.
    """
    for number in range(11):
        copies = dict(
            zip(DISTORTIONS, distorted(torch.zeros(3, 300, 400, dtype=torch.uint8), number))
        )
        width, height = copies["crop"].size
        assert 0.19 < width * height / 120_000 < 0.51 and width / height == pytest.approx(
            4 / 3, abs=0.02
        )
        assert all(copies[name].size == (400, 300) for name in ("blur", "insertion", "JPEG"))
        assert copies["print and scan"].width >= 400
        black = (np.asarray(copies["insertion"]).max(axis=2) == 0).mean()
        assert 0.15 < black < 0.52, f"the insertion shows {black:.0%} of the image"


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (2, 3)])
def test_images_of_any_size_are_distorted(size):
    """A copy of a single pixel is an image, too."""
    assert all(
        min(copy.size) >= 1 for copy in distorted(torch.zeros(3, *size, dtype=torch.uint8), 0)
    )


def test_the_descriptor_is_cls_joined_with_gem_of_the_patches():
    """[CLS], then (mean x^4)^(1/4) over the last block's patch tokens; of a ResNet its map stands
    for them.
    """
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        vit = build_backbone("vit_nano", 8, 32, init_std=0.2).eval()
        found, tokens = Descriptor(vit)(images), vit.get_intermediate_layers(images)[0]
        torch.testing.assert_close(found[:, :128], vit(images), msg="the first half is [CLS]")
        torch.testing.assert_close(
            found[:, 128:], (tokens[:, 1:].clamp(min=1e-6) ** 4).mean(dim=1) ** 0.25
        )
        resnet = build_backbone("resnet18").eval()
        found = Descriptor(resnet)(torch.randn(2, 3, 96, 64))
        assert (
            found.shape == (2, 1024)
            and (found[:, 512:] >= found[:, :512].clamp(min=1e-6) * 0.999).all()
        ), "the generalised mean with p = 4 is at least the mean"
        assert not resnet.avgpool._forward_pre_hooks


def test_copies_are_made_of_every_class_and_their_originals_are_no_distractors():
    """Class folders come class by class. Each image is an original or a distractor, once."""
    images = [torch.full((3, 2, 2), i, dtype=torch.uint8) for i in range(250)]
    test = Images(images, torch.arange(10).repeat_interleave(25))
    copies = made_copies(test, test)
    originals = [int(copies.originals[i][0][0, 0, 0]) for i in range(100)]
    distractors = [int(copies.distractors[i][0][0, 0, 0]) for i in range(150)]
    assert sorted(originals + distractors) == list(range(250))
    assert test.labels[originals].bincount().tolist() == [10] * 10

    classes = torch.arange(10).repeat_interleave(401)
    train = Images([images[i] for i in classes], classes)
    whitening = made_copies(train, test).whitening
    assert whitening.labels.bincount().tolist() == pytest.approx([200] * 10, abs=25)


def test_copies_are_found_among_distractors_by_their_pixels():
    """With pixels as descriptors blurred and compressed copies come first; chance would be a few
    percent.
    """
    drawn = make_creatures(150, 32)
    copies = made_copies(Images(drawn.images[:31]), Images(drawn.images[31:]))
    assert [len(part) for part in (copies.originals, copies.distractors, copies.whitening)] == [
        100,
        19,
        31,
    ]
    sizes = {name: len(block) for name, block in copies.blocks.items()}
    assert sizes == {f"strong, {name}": 100 for name in DISTORTIONS}
    found = find_copies(
        copies._replace(whitening=None),
        lambda images: torch.stack(
            [
                resize(image, [32, 32]).flatten().float()
                for image, _ in (images[i] for i in range(len(images)))
            ]
        ),
    )
    overall = found.pop("strong, not whitened, mAP %")
    assert (
        found["strong, blur, not whitened, mAP %"] > 95
        and found["strong, JPEG, not whitened, mAP %"] > 95
    )
    assert overall == pytest.approx(sum(found.values()) / len(found)), "all copies count alike"


def test_distractors_before_the_original_cost_precision():
    """By hand: one original found first, AP 1, the other after a distractor and an original, AP (0
    / 2 + 1 / 3) / 2.
    """
    image = torch.zeros(2, 3, 1, 1).byte()
    copies = Copies(
        Images(image, [0, 1]), {"jpegqual/3": Images(image, [0, 1])}, Images(image[:1]), None
    )
    descriptors = [
        (copies.originals, [[1.0, 0], [0, 1]]),
        (copies.distractors, [[0.6, 0.8]]),
        (copies.blocks["jpegqual/3"], [[1, 0.1], [0.5, 0.4]]),
    ]
    found = find_copies(
        copies,
        lambda part: torch.tensor(next(rows for known, rows in descriptors if known is part)),
    )
    assert found == {"jpegqual/3, not whitened, mAP %": pytest.approx(100 * (1 + 1 / 6) / 2)}


def test_all_blocks_of_copydays_are_read(tmp_path):
    """strong, jpegqual/Q and crops/P; names that do not fit and missing folders are named."""
    for name in (
        "original/200100.jpg",
        "original/200000.jpg",
        "strong/200102.jpg",
        "jpegqual/3/200000.jpg",
        "jpegqual/3/200100.jpg",
        "crops/80/200100.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7)).save(tmp_path / name)
    originals, blocks = open_copydays(tmp_path)
    assert {name: block.labels.tolist() for name, block in blocks.items()} == {
        "strong": [1],
        "jpegqual/3": [0, 1],
        "crops/80": [1],
    } and len(originals) == 2
    Image.new("RGB", (9, 7)).save(tmp_path / "strong" / "300001.jpg")
    with pytest.raises(InputError, match=r"300001\.jpg.*NNNN00"):
        open_copydays(tmp_path)
    with pytest.raises(InputError, match=r"lacks images in original/.*lay it out as Copydays"):
        open_copydays(tmp_path / "strong")


FLAGS = "--device cpu --eval_size 32 --num_workers 0".split()


def test_copies_are_made_of_the_test_images_of_class_folders(weights, tmp_path, capsys):
    drawn = make_creatures(20, 32)
    for number, image in enumerate(drawn.images):
        folder = tmp_path / "classes" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(folder / f"{number}.png")
    results = tmp_path / "results.jsonl"
    words = ["--pretrained_weights", str(weights), "--data_path", str(tmp_path / "classes")]
    copy_detection.main([*words, "--results", str(results), *FLAGS])
    assert "4 originals among 0 distractors, whitening from 16 images" in capsys.readouterr().out
    measured = json.loads(results.read_text())["measured"]
    assert {"strong, crop, not whitened, mAP %", "raw pixels, strong, not whitened, mAP %"} <= set(
        measured
    )


def test_from_folders_to_a_table(weights, tmp_path, capsys):
    """Copies, distractors and whitening from folders; jpegqual's copies here are the originals: all
    are found.
    """
    made = write_copydays(tmp_path / "made", 7)
    (made / "jpegqual" / "75").mkdir(parents=True)
    for path in (made / "original").iterdir():
        (made / "jpegqual" / "75" / path.name).write_bytes(path.read_bytes())
    copy_detection.main(
        [
            "--pretrained_weights",
            str(weights),
            "--data_path",
            str(made),
            "--distractors",
            str(save_creatures(tmp_path / "others", 11, 1)),
            "--whiten",
            str(save_creatures(tmp_path / "more", 13, 2)),
            "--results",
            str(tmp_path / "results.jsonl"),
            *FLAGS,
        ]
    )
    line = json.loads((tmp_path / "results.jsonl").read_text())
    assert set(line["measured"]) == {
        f"{block}, {step}, mAP %"
        for block in ("strong", "jpegqual/75")
        for step in ("whitened", "not whitened")
    }
    assert line["measured"]["jpegqual/75, whitened, mAP %"] == pytest.approx(100)
    assert "7 originals among 11 distractors, whitening from 13 images" in capsys.readouterr().out


def test_a_dataset_without_labels_is_named(weights, monkeypatch, capsys):
    unlabelled = Images(make_creatures(10, 32).images)
    monkeypatch.setattr(evaluation, "load_images", lambda *arguments: (unlabelled, None))
    words = ["--pretrained_weights", weights, "--dataset", "cifar10", *FLAGS]
    said = error_of(copy_detection.main, capsys, *words)
    assert "--dataset cifar10 lacks labelled train or test images" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--data_path {tmp}/nowhere", "--data_path"),
        ("--data_path {tmp}/photos", "Copydays"),
        ("--distractors {tmp}/photos", "--distractors and --whiten go with"),
        ("--data_path {tmp}/made --whiten {tmp}/nowhere", "nowhere"),
    ],
)
def test_what_is_missing_is_named(weights, tmp_path, capsys, flags, said):
    """One line with the flag or the file, and the fix."""
    save_creatures(tmp_path / "photos", 2)
    write_copydays(tmp_path / "made", 2)
    assert said in error_of(
        copy_detection.main,
        capsys,
        "--pretrained_weights",
        weights,
        *FLAGS,
        *flags.format(tmp=tmp_path).split(),
    )


def test_the_release_s_whitening_is_an_option(weights, tmp_path):
    """Around zero instead of the mean: other numbers whitened, and the same ones not whitened."""
    made = write_copydays(tmp_path / "made", 5)
    flags = ["--pretrained_weights", weights, "--data_path", made]
    flags += ["--whiten", save_creatures(tmp_path / "more", 13, 2), *FLAGS]
    flags += ["--results", tmp_path / "results.jsonl"]
    copy_detection.main([str(flag) for flag in flags])
    copy_detection.main([str(flag) for flag in [*flags, "--uncentred"]])
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    here, release = (json.loads(line)["measured"] for line in lines)
    assert here["strong, not whitened, mAP %"] == release["strong, not whitened, mAP %"]
    assert here["strong, whitened, mAP %"] != release["strong, whitened, mAP %"]
