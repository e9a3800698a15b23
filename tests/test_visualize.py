"""The attention figure, from a checkpoint and pictures of any shape to files."""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import visualize_attention
from attention import cls_attention, keep_mass
from backbone import build_backbone
from data import decode
from features import mean_and_std


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.manual_seed(0)
    torch.save(build_backbone("vit_nano", 8, 48, init_std=0.2).state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def photo(path: Path, size: tuple[int, int]) -> str:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return str(path)


def test_one_picture_gives_the_figure_and_the_releases_files(weights, tmp_path, capsys):
    picture = photo(tmp_path / "wide.png", (50, 170))
    visualize_attention.main(["--pretrained_weights", str(weights), "--image_path", picture, "--image_size", "40",
                              "--threshold", "0.6", "--output_dir", str(tmp_path / "out"), "--device", "cpu"])
    assert str(tmp_path / "out" / "attention.png") in capsys.readouterr().out
    heads = range(4)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "attention.png", "img.png", *(f"attn-head{j}.png" for j in heads), *(f"mask_th0.6_head{j}.png" for j in heads)}
    assert Image.open(tmp_path / "out" / "img.png").size == (136, 40), "the shape must be kept, in multiples of 8"


def test_several_pictures_of_different_shapes_share_one_figure(weights, tmp_path):
    pictures = [photo(tmp_path / f"{i}.png", size) for i, size in enumerate([(30, 60), (60, 30)])]
    visualize_attention.main(["--pretrained_weights", str(weights), "--image_path", *pictures, "--image_size", "32",
                              "--output_dir", str(tmp_path / "out"), "--device", "cpu"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"attention.png", "0-0", "1-1"}


def test_the_mask_file_shows_the_patches_that_hold_the_mass(weights, tmp_path):
    """The darkened pixels of the written mask are those that keep_mass leaves out."""
    white = tmp_path / "white.png"
    Image.fromarray(np.full((48, 64, 3), 255, dtype=np.uint8)).save(white)
    visualize_attention.main(["--pretrained_weights", str(weights), "--image_path", str(white), "--image_size", "48",
                              "--threshold", "0.6", "--output_dir", str(tmp_path / "out"), "--device", "cpu"])
    backbone = build_backbone("vit_nano", 8, 48).eval()
    backbone.load_state_dict(torch.load(weights, weights_only=True))
    mean, std = mean_and_std({})
    kept = keep_mass(cls_attention(backbone, ((torch.ones(1, 3, 48, 64) - mean) / std))[0, 1], 0.6)
    shown = decode(tmp_path / "out" / "mask_th0.6_head1.png")[0, 4::8, 4::8] > 128
    assert torch.equal(shown, kept)
