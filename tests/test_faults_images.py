"""Hostile images, folders and ground truths: each is a result or one clear line, and nothing hangs
or is run.
"""

import io
import os
import pickle
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_bad_input import TINY, error_of
from test_data import noise
from test_faults_weights import outcome

import data
import train
from data import decode, find_images, open_images, without_unreadable
from evals.attention_film import film_frames
from evals.davis import read_annotation
from evals.image_retrieval import read_ground_truth, read_plain_pickle
from features import EvaluationView
from multicrop import MultiCrop
from training.backbone import build_backbone
from training.evaluation import fit_to_patches
from visualize_attention import main as visualize

pytestmark = [pytest.mark.faults, pytest.mark.slow]
VIEWS = (MultiCrop(32, 16, local_number=1), EvaluationView(32))


def look(file: Path) -> torch.Tensor:
    """Decode it and see it as training, evaluations and the figure do."""
    image = decode(file)
    assert image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3
    for view in VIEWS:
        view(image)
    thin = min(image.shape[1:]) == 1 < max(image.shape[1:])
    assert ("would become" in outcome(lambda: fit_to_patches(image, 32, 16))) == thin
    return image


def png_of(width: int, height: int, colour: int = 2, depth: int = 8) -> bytes:
    """A PNG that claims this size and holds next to nothing."""
    chunk = lambda kind, body: (
        len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    )
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, colour, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def bytes_of(image: Image.Image, kind: str, **options) -> bytes:
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


NOISE = noise(size=(97, 61))
GREY16 = Image.fromarray((np.arange(97 * 61) * 11 % 65536).reshape(61, 97).astype(np.uint16))
PALETTE = NOISE.convert("P")
GOOD = {  # must be read
    "1x1.png": bytes_of(noise(size=(1, 1)), "PNG"),
    "tall.png": bytes_of(noise(size=(1, 20000)), "PNG"),
    "wide.png": bytes_of(noise(size=(20000, 1)), "PNG"),
    "wide.jpg": bytes_of(noise(size=(20000, 3)), "JPEG"),
    "png.jpg": bytes_of(NOISE, "PNG"),
    "jpg.png": bytes_of(NOISE, "JPEG"),
    "gif.bmp": bytes_of(NOISE, "GIF"),
    "animated.gif": bytes_of(NOISE, "GIF", save_all=True, append_images=[noise(1, (97, 61))] * 3),
    "animated.png": bytes_of(NOISE, "PNG", save_all=True, append_images=[noise(1, (97, 61))]),
    "animated.webp": bytes_of(NOISE, "WEBP", save_all=True, append_images=[noise(1, (97, 61))]),
    "grey16.png": bytes_of(GREY16, "PNG"),
    "grey16.tiff": bytes_of(GREY16, "TIFF"),
    "cmyk.jpg": bytes_of(NOISE.convert("CMYK"), "JPEG"),
    "cmyk.tiff": bytes_of(NOISE.convert("CMYK"), "TIFF"),
    "palette.png": bytes_of(PALETTE, "PNG", transparency=3),
    "palette bytes.png": bytes_of(PALETTE, "PNG", transparency=bytes(range(256))),
    "alpha.webp": bytes_of(NOISE.convert("RGBA"), "WEBP"),
    "one bit.png": bytes_of(NOISE.convert("1"), "PNG"),
    "name with spaces.png": bytes_of(NOISE, "PNG"),
    "two\nlines.png": bytes_of(NOISE, "PNG"),
    "κατοικίδιο 猫.png": bytes_of(NOISE, "PNG"),
    "-rf.png": bytes_of(NOISE, "PNG"),
    "'\".png": bytes_of(NOISE, "PNG"),
}
for turn in range(9):
    exif = Image.Exif()
    exif[0x0112] = turn
    GOOD[f"turned {turn}.jpg"] = bytes_of(NOISE, "JPEG", exif=exif)
BAD = {  # must be named
    "empty.png": b"",
    "bomb.png": png_of(60_000, 60_000),
    "no width.png": png_of(0, 5),
    "huge.png": png_of(2**31 - 1, 9),
    "only a header.gif": b"GIF89a",
    "16 bit bomb.png": png_of(50_000, 50_000, 6, 16),
    "text.jpg": b"no image",
    "zeros.tiff": bytes(1000),
    "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(was-here) (w) file\n",
}


@pytest.mark.parametrize("name", GOOD)
def test_odd_images_are_read(name, tmp_path):
    (tmp_path / name).write_bytes(GOOD[name])
    image = look(find_images(tmp_path)[0])
    assert (
        image.shape[1:] in ((61, 97), (97, 61)) or "x" in name or "tall" in name or "wide" in name
    )
    if "turned" in name:
        assert image.shape[1] == (97 if int(name[7]) in (5, 6, 7, 8) else 61), (
            "EXIF says how it was held"
        )


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_named_in_one_line_and_can_be_left_out(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(BAD[name])
    assert name in outcome(lambda: look(tmp_path / name))
    assert outcome(lambda: list(film_frames(tmp_path / name))) and outcome(
        lambda: read_annotation(tmp_path / name)
    )
    good, messages = without_unreadable(data.open_folder(tmp_path))
    assert len(good) == 0 and len(messages) == 1 and os.listdir() == [name]


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA", "JPEG2000"]
)
def test_flipped_and_cut_images_are_a_result_or_one_line(kind, tmp_path):
    """Thirty of each kind."""
    rng, whole, file = random.Random(kind), bytes_of(NOISE, kind), tmp_path / "image.png"
    for number in range(30):
        spoilt = bytearray(whole)
        for _ in range(rng.randint(1, 9)):
            spoilt[rng.randrange(min(len(spoilt), 400))] = rng.randrange(256)
        file.write_bytes(spoilt if number % 3 else spoilt[: rng.randrange(len(spoilt))])
        outcome(lambda: look(file))


def test_links_pipes_and_folders_that_look_like_images_do_not_hang(tmp_path):
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    (folder / "good.png").write_bytes(GOOD["png.jpg"])
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "below/up").symlink_to("..", target_is_directory=True)
    (folder / "self.png").symlink_to("self.png")
    (folder / "nowhere.png").symlink_to("gone.png")
    (folder / "folder.png").mkdir()
    (folder / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(tmp_path / "gnd_pipe.pkl")
    good, messages = without_unreadable(open_images(str(folder))[0])
    assert len(good) == 1 and len(messages) == 4, messages
    assert outcome(lambda: read_plain_pickle(tmp_path / "gnd_pipe.pkl"))


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything"
)
def test_what_may_not_be_read_is_named(tmp_path):
    (tmp_path / "secret.png").write_bytes(GOOD["png.jpg"])
    (tmp_path / "secret.png").chmod(0)
    assert "secret.png" in outcome(lambda: look(tmp_path / "secret.png"))


@pytest.mark.parametrize(
    "path", ["x" * 5000, "/dev/null", "/proc/self/mem", "no\nfolder", "\udcff"]
)
@pytest.mark.parametrize("flag", ["--data_path", "--init_from", "--output_dir"])
def test_a_path_that_is_none_is_one_line(path, flag, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / f"photos/{number}.png").write_bytes(GOOD["png.jpg"])
    flags = {"--data_path": "photos", "--output_dir": "out", "--knn_every": 0} | {flag: path}
    if flag == "--output_dir" and ("folder" in path or "\udcff" in path):
        return  # such a folder can be made
    error_of(train.main, capsys, *TINY, *(word for pair in flags.items() for word in pair))


def test_scripts_end_in_one_line_on_images_too_long_to_look_at(capsys, tmp_path):
    torch.save(build_backbone("vit_nano", 8, 48).state_dict(), tmp_path / "nano.pth")
    (tmp_path / "tall.png").write_bytes(GOOD["tall.png"])
    flags = [
        "--pretrained_weights",
        tmp_path / "nano.pth",
        "--image_path",
        tmp_path / "tall.png",
        "--device",
        "cpu",
        "--output_dir",
        tmp_path / "out",
    ]
    assert "an image of 1 x 20000 pixels would become" in error_of(visualize, capsys, *flags)
    assert "cannot be decoded" not in outcome(
        lambda: EvaluationView(224)(decode(tmp_path / "tall.png"))
    )


def nested(depth: int) -> list:
    """Lists in lists, each twice in the next: 2^depth entries if one walks through them all."""
    inside: list = [1]
    for _ in range(depth):
        inside = [inside, inside]
    return inside


def endless() -> list:
    inside: list = []
    inside.append(inside)
    return inside


TRUTH = {
    "imlist": ["a", "b"],
    "qimlist": ["a"],
    "gnd": [{"bbx": [0, 0, 9, 9], "easy": [1], "hard": [0], "junk": []}],
}
ODD = [
    None,
    "text",
    -1,
    10**30,
    float("nan"),
    [],
    {},
    [None],
    ["x"] * 3,
    [[1]],
    nested(40),
    endless(),
    "x" * 5000,
    np.zeros(3),
    np.array([10**9]),
    np.array(["a"]),
    ["\0"],
    ["../" * 99 + "etc/passwd"],
    [1.5],
    [True],
    [float("inf")],
]


@pytest.mark.parametrize(
    "place", ["all", "imlist", "qimlist", "gnd", "bbx", "easy", "hard", "junk"]
)
def test_odd_ground_truths_are_refused_in_one_line_or_read(place, tmp_path):
    (tmp_path / "jpg").mkdir()
    for name in "ab":
        (tmp_path / f"jpg/{name}.jpg").write_bytes(GOOD["jpg.png"])
    file = tmp_path / "gnd_roxford5k.pkl"
    for value in ODD:
        truth = (
            value
            if place == "all"
            else TRUTH | {place: value}
            if place in TRUTH
            else (TRUTH | {"gnd": [TRUTH["gnd"][0] | {place: value}]})
        )
        for protocol in (2, 4):
            file.write_bytes(pickle.dumps(truth, protocol))
            said = outcome(lambda: read_ground_truth(file))
            assert said or place in ("easy", "hard", "junk") or list(value) == ["a"], (
                f"{place} {str(value)[:50]}"
            )


def test_cut_flipped_and_boastful_pickles_are_refused_or_read(tmp_path):
    rng, file = random.Random(0), tmp_path / "gnd_roxford5k.pkl"
    whole = pickle.dumps(TRUTH | {"more": np.arange(99)}, 4)
    boasts = [
        b"\x80\x04\x8d" + (10 * 2**30).to_bytes(8, "little") + b"x.",
        b"\x80\x02\x8b\xff\xff\xff\x7fx.",
        b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.",
        b"(" * 10**5 + b".",
        b"]" + b"2a" * 99 + b".",
    ]
    cuts = [whole[: len(whole) * twentieth // 20] for twentieth in range(20)]
    for spoilt in boasts + cuts:
        file.write_bytes(spoilt)
        assert outcome(lambda: read_ground_truth(file))
    for _ in range(200):
        spoilt = bytearray(whole)
        for _ in range(rng.randint(1, 5)):
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
        file.write_bytes(spoilt)
        outcome(lambda: read_ground_truth(file))
